"""The three consistency losses, of one pair.

- AttCT, attention consistency ("Attention Consistency Training", a research proposal): the same tokens get the same
  attention in both prompts, and what only the wrapped prompt has gets none.
- ACT, activation consistency (Irpan et al., "Consistency Training Helps Stop Sycophancy and Jailbreaks",
  arXiv:2510.27062): the residual stream is the same at the same tokens.
- BCT, bias-augmented consistency (Chua et al., arXiv:2403.05518): the model's own answer to the clean prompt is the
  likely one under the wrapped prompt.

What stands on the clean side is a target: it gets no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ATTCT, ACT, BCT = METHODS = ("attct", "act", "bct")


def attct(
    wrapped: Mapping[int, torch.Tensor],
    clean: Mapping[int, torch.Tensor],
    wrapped_keys: torch.Tensor,
    clean_keys: torch.Tensor,
) -> torch.Tensor:
    """Mean over layers, heads and query rows of the sum over keys of (attention - target)^2: the squared L2 distance of
    two rows.

    wrapped, clean: by layer, [heads, n, W] and [heads, n, C] attention rows of the same n tokens. wrapped_keys,
    clean_keys: [k] places of the keys in common; the target of every other wrapped key is 0.
    """
    return _mean(
        squared_distance(rows, clean[layer], wrapped_keys, clean_keys).mean() for layer, rows in wrapped.items()
    )


def attention_distances(
    wrapped: Mapping[int, torch.Tensor],
    clean: Mapping[int, torch.Tensor],
    wrapped_keys: torch.Tensor,
    clean_keys: torch.Tensor,
) -> dict[int, float]:
    """By layer, the mean over heads and rows of the L2 distance that `attct` squares."""
    return {
        layer: float(squared_distance(rows, clean[layer], wrapped_keys, clean_keys).sqrt().mean())
        for layer, rows in wrapped.items()
    }


def act(wrapped: Mapping[int, torch.Tensor], clean: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Mean over layers, tokens and dimensions of (activation - target)^2; by layer, [n, hidden] each."""
    return _mean((states - clean[layer].detach()).square().mean() for layer, states in wrapped.items())


def bct(logits: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats, of the clean answer's tokens [n] under logits [n, vocabulary]."""
    import torch

    return torch.nn.functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, answer)


def squared_distance(
    wrapped: torch.Tensor, clean: torch.Tensor, wrapped_keys: torch.Tensor, clean_keys: torch.Tensor
) -> torch.Tensor:
    """[heads, n]."""
    target = wrapped.new_zeros(wrapped.shape).index_copy(2, wrapped_keys, clean.detach()[..., clean_keys])
    return (wrapped - target).square().sum(-1)


def _mean(values: Iterable[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack(list(values)).mean()
