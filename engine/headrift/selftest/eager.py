"""The masses by transformers with eager attention: slow, and the definition in other people's code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

# Of the weights' size: activations, and the attention matrices of the longest prompt.
_HEADROOM = 1.25


class CannotCompareError(RuntimeError):
    """transformers cannot run this model here; the message says why."""


class EagerModel:
    """The model in float32 with eager attention, on the GPU where it fits there, else in main memory.

    CannotCompareError where it fits neither, or transformers cannot load it.
    """

    def __init__(self, model: str, *, trust_remote_code: bool = False):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                shape = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            self.device = _place(4 * sum(parameter.numel() for parameter in shape.parameters()))
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
            )
            self._model = loaded.to(self.device).eval()
        except CannotCompareError:
            raise
        except Exception as error:  # a model's files and code can fail in any way
            said = str(error).strip().partition("\n")[0]
            raise CannotCompareError(f"transformers cannot load the model: {type(error).__name__}: {said}") from error

    def masses(self, fed: Sequence[int], first: int, spans: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
        """[queries, layers, heads, spans] masses on key ranges of the queries first, first + 1, ... of these tokens."""
        import torch

        with torch.inference_mode():
            tokens = torch.tensor([list(fed)], device=self.device)
            layers = self._model(tokens, use_cache=False, output_attentions=True).attentions
            rows = torch.stack([layer[0, :, first:].float() for layer in layers]).permute(2, 0, 1, 3)
            return torch.stack([rows[..., start:end].sum(-1) for start, end in spans], -1).cpu().numpy()


def _place(weights: int) -> torch.device:
    """Where a model of so many bytes fits."""
    import psutil
    import torch

    need = int(weights * _HEADROOM)
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > need:
        return torch.device("cuda")
    free = psutil.virtual_memory().available
    if free > need:
        return torch.device("cpu")
    sizes = f"transformers would take {need / 1e9:.0f} GB for it in float32, and {free / 1e9:.0f} GB are free"
    raise CannotCompareError(f"the model is too large to compare with: {sizes}")
