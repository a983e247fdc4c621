"""How the memory of a GPU is shared by the engines of bench/overhead_gpu.py: which cases fit, with how many layers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from _model_math import Shapes

# Of an engine besides weights and KV cache: CUDA context, activations of 8,192 tokens, logits, graphs and recorder.
ENGINE_BYTES = 5 << 30
USABLE = 0.95  # of what is free: allocators round up
GB = 1e9


@dataclass(frozen=True)
class Memory:
    """What fits a GPU.

    Args:
        engines: Engines that run at once.
        kv_bytes: KV cache of each, enough for every case that fits.
        too_large: The other cases, each with the reason.
    """

    engines: int
    kv_bytes: int
    too_large: dict[str, str]


def share_memory(total: float, weights: int, cases: Mapping[str, int], engines: int = 1) -> Memory | None:
    """Return what fits when each engine gets an equal share, with the most engines at once that hold any case.

    Args:
        total: Bytes that are free.
        weights: Bytes of the weights of each engine.
        cases: Bytes of KV cache that each case needs, by name.
        engines: The most engines that are of use at once.

    Returns:
        None if one engine alone holds no case.
    """
    for at_once in range(engines, 0, -1):
        room = USABLE * total / at_once - weights - ENGINE_BYTES
        fitting = [need for need in cases.values() if need <= room]
        if fitting:
            reason = f"needs {{:.1f}} GB of KV cache, and {room / GB:.1f} GB are left"
            too_large = {name: reason.format(need / GB) for name, need in cases.items() if need > room}
            return Memory(at_once, max(fitting), too_large)
    return None


def choose_layers(
    total: float, shapes: Sequence[Shapes], tokens: Mapping[str, int], engines: int = 1, element: int = 2
) -> tuple[Shapes, Memory]:
    """Return the first of some shapes that fits, and what fits with it.

    Args:
        total: Bytes that are free.
        shapes: The same model with fewer and fewer layers.
        tokens: Tokens that the KV cache must hold for each case, by name.
        engines: The most engines that are of use at once.
        element: Bytes of a weight, key or value.

    Raises:
        ValueError: If not even the last shape fits.
    """
    for shape in shapes:
        needs = {name: shape.kv_bytes(n, element) for name, n in tokens.items()}
        weights = element * shape.parameters
        memory = share_memory(total, weights, needs, engines)
        if memory is not None:
            return shape, memory
    need = (weights + ENGINE_BYTES + min(needs.values())) / USABLE / GB
    raise ValueError(f"{total / GB:.1f} GB of GPU memory are free, and the smallest case needs {need:.1f} GB")


def free_bytes() -> tuple[int, int]:
    """Free and total bytes of the GPU. In a process of its own: this one's CUDA context would take some of them."""
    program = "import json, torch; print(json.dumps(torch.cuda.mem_get_info()))"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    free, total = json.loads(done.stdout.splitlines()[-1])
    return free, total
