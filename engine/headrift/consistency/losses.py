"""The three consistency losses, of one pair.

- AttCT, attention consistency ("Attention Consistency Training", a research proposal): the same tokens get the same
  attention in both prompts, and what only the wrapped prompt has gets none.
- ACT, activation consistency (Irpan et al., "Consistency Training Helps Stop Sycophancy and Jailbreaks",
  arXiv:2510.27062): the residual stream is the same at the same tokens.
- BCT, bias-augmented consistency (Chua et al., arXiv:2403.05518): the model's own answer to the clean prompt is the
  likely one under the wrapped prompt.

Beside any of them, on plain text that has nothing to do with the pairs:

- keep: the next token is as likely as it was (KL divergence). A LoRA that evens out attention is felt in all text.

What stands on the clean side, and how likely a token was, is a target: it gets no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ATTCT, ACT, BCT = METHODS = ("attct", "act", "bct")
KEEP = "keep"


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


def keep(logits: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of KL(before || now) of the next token, in nats; logits of both, [n, vocabulary]."""
    import torch

    was, now = (torch.log_softmax(values, -1) for values in (before.detach(), logits))
    return torch.nn.functional.kl_div(now, was, log_target=True, reduction="batchmean")


def squared_distance(
    wrapped: torch.Tensor, clean: torch.Tensor, wrapped_keys: torch.Tensor, clean_keys: torch.Tensor
) -> torch.Tensor:
    """[heads, n]."""
    target = wrapped.new_zeros(wrapped.shape).index_copy(2, wrapped_keys, clean.detach()[..., clean_keys])
    return (wrapped - target).square().sum(-1)


def _mean(values: Iterable[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack(list(values)).mean()
