"""What the machine's matrix products reach: float32 products of a model's own shapes, by rows at once."""

from __future__ import annotations

import time
from typing import Any

from _model_math import Shapes

ROWS = (8, 64, 512, 2048)
_SECONDS = 0.15  # of repeats of each product


def matrix_product_rates(shapes: Shapes) -> dict[str, Any]:
    """GFLOP/s of each product of the model, by rows, and the best of all: the machine's peak here."""
    import torch

    rates: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for rows in ROWS:
            rates[str(rows)] = {}
            for name, (inputs, outputs) in shapes.matrices.items():
                given, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
                torch.nn.functional.linear(given, weight)
                n, start = 0, time.perf_counter()
                while (seconds := time.perf_counter() - start) < _SECONDS or n < 2:
                    torch.nn.functional.linear(given, weight)
                    n += 1
                rates[str(rows)][name] = 2e-9 * n * rows * inputs * outputs / seconds
    return {"gflops": rates, "peak_gflops": max(rate for of in rates.values() for rate in of.values())}
