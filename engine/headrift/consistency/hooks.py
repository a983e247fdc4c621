"""Attention rows of a transformers model that runs its fast attention.

transformers hands every layer's queries and keys, after norms and rotary embedding, to an attention function that it
looks up by name. Ours runs SDPA as before and works out, beside it, the softmax rows of the queries that are asked for,
from the very same q and k. So whatever a model does to q and k (Llama, Qwen3's norms, Gemma-3's two rotary bases and
scale) is the model's own code, no full map exists at any time, and the rows carry gradients like anything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "headrift_sdpa"
# From so many tokens on, what a training's layers computed is not kept for the backward pass but computed again there:
# a third of the memory for a quarter more time, which short prompts can do without.
RECOMPUTED_FROM = 256
# Of prompts in one pass: more take more memory, and are hardly faster.
_TOKENS_AT_ONCE = 512


class UnsupportedModelError(ValueError):
    """The model's attention has a part that the rows here leave out; the message names it."""


@dataclass(slots=True)
class Rows:
    """The attention rows to keep of a forward pass over one prompt or several, and then these rows.

    queries: of each prompt, [n] positions of the query tokens; lengths: of each prompt, in tokens. layers: whose rows
    are kept. kept: of each prompt, by layer, [heads, n, keys] softmax probabilities over its keys, in float32 or the
    model's wider type; 0 for keys that the query may not see. content: whether what the rows gather is kept too;
    contents: of each prompt, by layer, [heads, n, dim], rows times values.
    """

    queries: list[torch.Tensor]
    lengths: list[int]
    layers: frozenset[int]
    content: bool = False
    kept: list[dict[int, torch.Tensor]] = field(default_factory=list)
    contents: list[dict[int, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kept, self.contents = [{} for _ in self.queries], [{} for _ in self.queries]


@dataclass(slots=True)
class Pass:
    """What a forward pass left of one prompt.

    rows, contents: as in Rows. states: by layer, the residual stream behind it at the same queries, [n, hidden], behind
    the last layer after the model's final norm. last: the last hidden states, [tokens, hidden].
    """

    rows: dict[int, torch.Tensor]
    contents: dict[int, torch.Tensor]
    states: dict[int, torch.Tensor]
    last: torch.Tensor


def install(model: Any) -> None:
    """Let a transformers model attend by the function here. UnsupportedModelError for softcaps and sinks."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError("the model caps its attention scores (softcap), which SDPA does not: take another")
    if any(hasattr(module, "sinks") for module in model.modules()):
        raise UnsupportedModelError("the model attends with sinks, which its SDPA leaves out: take another model")
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def recompute_long(model: Any) -> None:
    """Let passes over RECOMPUTED_FROM tokens and more be computed again in the backward pass. model: as `install` had,
    with its LoRA."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def run(
    model: Any,
    token_ids: Sequence[int],
    queries: Sequence[int],
    layers: frozenset[int],
    *,
    states: bool = False,
    content: bool = False,
) -> Pass:
    """One forward pass over one prompt, with the attention rows of these queries in these layers.

    model: the decoder without its head, which `install` was given. states, content: keep those too (see Pass).
    """
    return run_together(model, [token_ids], [queries], layers, states=states, content=content)[0]


def in_one_pass(lengths: Sequence[int]) -> list[list[int]]:
    """Which prompts to run together, by their places: neighbours in length, as many as there is room for."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found and lengths[i] * (len(found[-1]) + 1) <= _TOKENS_AT_ONCE:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def run_together(
    model: Any,
    prompts: Sequence[Sequence[int]],
    queries: Sequence[Sequence[int]],
    layers: frozenset[int],
    *,
    states: bool = False,
    content: bool = False,
) -> list[Pass]:
    """`run` of several prompts in one forward pass. The shorter ones are padded behind their end, where causal
    attention sees nothing."""
    import torch

    lengths = [len(ids) for ids in prompts]
    asked = [torch.tensor(list(of), dtype=torch.long, device=model.device) for of in queries]
    rows = Rows(asked, lengths, layers, content)
    padded = [[*ids, *[ids[-1]] * (max(lengths) - len(ids))] for ids in prompts]
    with _recomputed(model, torch.is_grad_enabled() and max(lengths) >= RECOMPUTED_FROM):
        tokens = torch.tensor(padded, device=model.device)
        out = model(tokens, use_cache=False, output_hidden_states=states, attention_rows=rows)
    if any(len(kept) < len(layers) for kept in rows.kept):
        raise UnsupportedModelError("the model's layers do not hand their attention on: it cannot be trained here")
    found = []
    for i, (length, of) in enumerate(zip(lengths, asked)):
        behind = {layer: out.hidden_states[layer + 1][i, of] for layer in layers} if states else {}
        found.append(Pass(rows.kept[i], rows.contents[i], behind, out.last_hidden_state[i, :length]))
    return found


@contextmanager
def _recomputed(model: Any, wanted: bool) -> Iterator[None]:
    """transformers' layers look at their own `training` for this, and nothing else does."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = wanted and layer.gradient_checkpointing
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    attention_rows: Rows | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA as transformers calls it; query [batch, heads, tokens, dim], key and value with the heads of K and V."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_rows is not None and module.layer_idx in attention_rows.layers:
        for i, length in enumerate(attention_rows.lengths):
            mask = None if attention_mask is None else attention_mask[min(i, len(attention_mask) - 1), 0]
            asked = attention_rows.queries[i]
            rows = softmax_rows(query[i], key[i, :, :length], mask, scaling, asked)
            attention_rows.kept[i].setdefault(module.layer_idx, rows)  # not those that are computed again
            if attention_rows.content:
                each = value[i, :, :length].repeat_interleave(len(rows) // value.shape[1], 0)
                attention_rows.contents[i][module.layer_idx] = rows.to(each.dtype) @ each
    attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attended, None


def softmax_rows(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float, queries: torch.Tensor
) -> torch.Tensor:
    """[heads, n, tokens] softmax(q k^T * scaling) of one prompt at n query positions, in at least float32.

    query: [heads, at least tokens, dim]; key: [kv_heads, tokens, dim], each for heads / kv_heads heads in a row; mask:
    True for keys that a query may see, [at least tokens, at least tokens], or None for all up to itself.
    """
    import torch

    n_heads, n_keys = query.shape[0], key.shape[1]
    # Heads that share a key head are so many more queries to it: K is not repeated.
    picked = query[:, queries].unflatten(0, (key.shape[0], -1)).flatten(1, 2)
    scores = torch.matmul(picked, key.transpose(1, 2)).unflatten(1, (-1, len(queries))).flatten(0, 1) * scaling
    if mask is None:
        seen = torch.arange(n_keys, device=key.device) <= queries[:, None]
    else:
        seen = mask[queries, :n_keys]
    scores = scores.masked_fill(~seen, -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    assert scores.shape == (n_heads, len(queries), n_keys)
    return torch.softmax(scores, -1, dtype=wide)
