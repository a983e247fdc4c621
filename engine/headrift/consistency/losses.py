"""The three consistency losses of one pair.

- AttCT, attention consistency ("Attention Consistency Training", a research proposal): the same tokens get the same
  attention in both prompts, and tokens only in the wrapped prompt get none.
- ACT, activation consistency (Irpan et al., "Consistency Training Helps Stop Sycophancy and Jailbreaks",
  arXiv:2510.27062): the residual stream is the same at the same tokens.
- BCT, bias-augmented consistency (Chua et al., arXiv:2403.05518): the model's own answer to the clean prompt is likely
  after the wrapped prompt.

With any of them, on plain text that is in no pair:

- keep: the next token stays as likely as it was (KL divergence), because a LoRA that evens out attention affects all
  text.

The clean side, and how likely a token was, are targets without a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

ATTCT, ACT, BCT = METHODS = ("attct", "act", "bct")
KEEP = "keep"


def attct(
    wrapped: Mapping[int, torch.Tensor],
    clean: Mapping[int, torch.Tensor],
    wrapped_keys: torch.Tensor,
    clean_keys: torch.Tensor,
) -> torch.Tensor:
    """Squared L2 distance between attention rows and their targets; mean over layers, heads and rows.

    Args:
        wrapped: by layer, [heads, n, W] attention rows of the n tokens in common.
        clean: by layer, [heads, n, C] attention rows of the same tokens.
        wrapped_keys: [k] positions of the keys in common in the wrapped prompt; the target of every other key is 0.
        clean_keys: [k] their positions in the clean prompt.
    """
    keys = wrapped_keys, clean_keys
    return torch.stack([squared_distance(rows, clean[at], *keys).mean() for at, rows in wrapped.items()]).mean()


def act(wrapped: Mapping[int, torch.Tensor], clean: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Squared difference of activations, by layer [n, hidden]; mean over layers, tokens and dimensions."""
    return torch.stack([(states - clean[at].detach()).square().mean() for at, states in wrapped.items()]).mean()


def bct(logits: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats, of the clean answer's tokens [n] under logits [n, vocabulary]."""
    return torch.nn.functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, answer)


def keep(logits: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of KL(before || now) of the next token, in nats; logits of both, [n, vocabulary]."""
    was, now = (torch.log_softmax(values, -1) for values in (before.detach(), logits))
    return torch.nn.functional.kl_div(now, was, log_target=True, reduction="batchmean")


def squared_distance(
    wrapped: torch.Tensor, clean: torch.Tensor, wrapped_keys: torch.Tensor, clean_keys: torch.Tensor
) -> torch.Tensor:
    """Squared L2 distance [heads, n] of one layer's rows; arguments as in `attct`."""
    target = wrapped.new_zeros(wrapped.shape).index_copy(2, wrapped_keys, clean.detach()[..., clean_keys])
    return (wrapped - target).square().sum(-1)
