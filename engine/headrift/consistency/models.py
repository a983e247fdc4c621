"""The transformers model that is trained and evaluated: attention rows, greedy answers, and its LoRA.

transformers hands every layer's queries and keys, after norms and rotary embedding, to an attention function that it
looks up by name. The one here runs SDPA as before and also computes the softmax rows of selected queries from the same
q and k. So whatever a model does to q and k (Llama, Qwen3's norms, Gemma-3's two rotary bases and scale) is the model's
own code, no full attention map exists at any time, and the rows carry gradients like any other tensor.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrift.consistency.pairs import Pair

if TYPE_CHECKING:
    import torch

ATTENTION_NAME = "headrift_sdpa"
# From this many tokens on, activations are recomputed in the backward pass: a third of the memory for a quarter more
# time, which short prompts do not need.
RECOMPUTED_FROM = 256
# Tokens of the prompts in one pass: more take more memory, and are hardly faster.
_TOKENS_PER_PASS = 512
ANSWER_BATCH = 16
ADAPTER_WEIGHTS, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# The attention's own matrices: what attention consistency can change, and the same for all methods.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class UnsupportedModelError(ValueError):
    """The model's attention has a part that the rows here would leave out; the message names it."""


class LoraError(ValueError):
    """The adapter cannot be used with the model; the message says why and what to do."""


@dataclass(slots=True)
class RowCapture:
    """Which attention rows a forward pass keeps of each prompt, and then these rows."""

    queries: list[torch.Tensor]  # [n] positions of query tokens
    lengths: list[int]  # in tokens
    layers: frozenset[int]
    content: bool  # keep what the rows gather too
    # By layer, [heads, n, keys] softmax probabilities in float32 or wider; 0 for keys that the query may not see.
    rows: list[dict[int, torch.Tensor]]
    contents: list[dict[int, torch.Tensor]]  # by layer, [heads, n, dim], rows times values


@dataclass(slots=True)
class ForwardPass:  # of one prompt
    rows: dict[int, torch.Tensor]  # as in RowCapture
    contents: dict[int, torch.Tensor]
    # By layer, the residual stream after it at the queries, [n, hidden]; after the last one, behind the final norm.
    states: dict[int, torch.Tensor]
    last: torch.Tensor  # the last hidden states, [tokens, hidden]


def load_model(folder: Path) -> Any:
    """Load a model in float32 and `install` its attention function, on the GPU if there is one."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    install(model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def install(model: Any) -> None:
    """Set a transformers model's attention function; UnsupportedModelError if it caps scores or has sinks."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError("the model caps attention scores (softcap), which SDPA does not: use another model")
    if any(hasattr(module, "sinks") for module in model.modules()):
        raise UnsupportedModelError("the model has attention sinks, which SDPA leaves out: use another model")
    AttentionInterface.register(ATTENTION_NAME, _attend)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    model.set_attn_implementation(ATTENTION_NAME)


def recompute_long_prompts(model: Any) -> None:
    """From RECOMPUTED_FROM tokens on, recompute activations in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def batch_by_length(lengths: Sequence[int], most: int = _TOKENS_PER_PASS) -> list[list[int]]:
    """Group prompts, by index, to run together: neighbours in length, with at most so many tokens, padded."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and lengths[i] * (len(groups[-1]) + 1) <= most:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def forward(
    decoder: Any, token_ids: Sequence[int], queries: Sequence[int], layers: frozenset[int], **keep: bool
) -> ForwardPass:
    """`forward_batch` of one prompt."""
    return forward_batch(decoder, [token_ids], [queries], layers, **keep)[0]


def forward_pairs(
    decoder: Any, pairs: Sequence[Pair], side: str, layers: frozenset[int], **keep: bool
) -> list[ForwardPass]:
    """`forward_batch` of one side of pairs, clean or wrapped, with the queries to compare."""
    prompts, queries = ([getattr(pair, f"{side}_{name}") for pair in pairs] for name in ("ids", "queries"))
    return forward_batch(decoder, prompts, queries, layers, **keep)


def forward_batch(
    decoder: Any,
    prompts: Sequence[Sequence[int]],
    queries: Sequence[Sequence[int]],
    layers: frozenset[int],
    *,
    states: bool = False,
    content: bool = False,
) -> list[ForwardPass]:
    """Run prompts in one forward pass and keep the attention rows of queries in some layers.

    Shorter prompts are padded at their end, where causal attention does not see them.

    Args:
        decoder: the model without its head, after `install`.
        queries: per prompt, positions of query tokens.
        states, content: keep those too (see ForwardPass).
    """
    import torch

    lengths = [len(ids) for ids in prompts]
    positions = [torch.tensor(list(own), dtype=torch.long, device=decoder.device) for own in queries]
    capture = RowCapture(positions, lengths, layers, content, [{} for _ in prompts], [{} for _ in prompts])
    padded = [[*ids, *[ids[-1]] * (max(lengths) - len(ids))] for ids in prompts]
    with _recomputed(decoder, torch.is_grad_enabled() and max(lengths) >= RECOMPUTED_FROM):
        tokens = torch.tensor(padded, device=decoder.device)
        out = decoder(tokens, use_cache=False, output_hidden_states=states, attention_rows=capture)
    if any(len(rows) < len(layers) for rows in capture.rows):
        raise UnsupportedModelError("the model's layers do not pass attention arguments on: use another model")
    passes = []
    for i, (length, own) in enumerate(zip(lengths, positions)):
        after = {layer: out.hidden_states[layer + 1][i, own] for layer in layers} if states else {}
        passes.append(ForwardPass(capture.rows[i], capture.contents[i], after, out.last_hidden_state[i, :length]))
    return passes


@contextmanager
def _recomputed(model: Any, on: bool) -> Iterator[None]:
    """Turn recomputing on: transformers' layers read their own `training` for this, and nothing else does."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = on and layer.gradient_checkpointing
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
    attention_rows: RowCapture | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA as transformers calls it; query [batch, heads, tokens, dim], key and value with the heads of K and V."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    capture, layer = attention_rows, module.layer_idx
    if capture is not None and layer in capture.layers:
        for i, length in enumerate(capture.lengths):
            mask = None if attention_mask is None else attention_mask[min(i, len(attention_mask) - 1), 0]
            rows = softmax_rows(query[i], key[i, :, :length], mask, scaling, capture.queries[i])
            capture.rows[i].setdefault(layer, rows)  # not those of the recomputed pass
            if capture.content:
                values = value[i, :, :length].repeat_interleave(len(rows) // value.shape[1], 0)
                capture.contents[i][layer] = rows.to(values.dtype) @ values
    attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attended, None


def softmax_rows(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float, queries: torch.Tensor
) -> torch.Tensor:
    """Attention rows [heads, n, tokens] of one prompt, softmax(q k^T * scaling), in at least float32.

    Args:
        query, key: [heads, at least tokens, dim] and [kv_heads, tokens, dim].
        mask: [at least tokens, at least tokens], True for keys that a query may see; None for all up to itself.
        queries: [n] positions.
    """
    import torch

    n_heads, n_keys = query.shape[0], key.shape[1]
    # Heads that share a key head become more queries of it, so that K is not repeated.
    picked = query[:, queries].unflatten(0, (key.shape[0], -1)).flatten(1, 2)
    scores = torch.matmul(picked, key.transpose(1, 2)).unflatten(1, (-1, len(queries))).flatten(0, 1) * scaling
    visible = torch.arange(n_keys, device=key.device) <= queries[:, None] if mask is None else mask[queries, :n_keys]
    scores = scores.masked_fill(~visible, -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    assert scores.shape == (n_heads, len(queries), n_keys)
    return torch.softmax(scores, -1, dtype=wide)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Answer prompts greedily, many at a time, with token ids; the token that ended an answer is in it.

    The same prompts in the same order give the same answers.
    """
    import torch

    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = [*(configured if isinstance(configured, list | tuple) else [configured]), tokenizer.eos_token_id]
    end = {token for token in ends if token is not None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(end)
    greedy = {
        "max_new_tokens": max_tokens,
        "pad_token_id": pad,
        "eos_token_id": sorted(end),
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        **dict.fromkeys(("temperature", "top_p", "top_k")),
    }
    answers: dict[int, list[int]] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    for first in range(0, len(by_length), ANSWER_BATCH):
        batch = by_length[first : first + ANSWER_BATCH]
        longest = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[pad] * (longest - len(prompts[i])) + list(prompts[i]) for i in batch])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        with torch.inference_mode():
            out = model.generate(**inputs, **greedy)
        for i, answer in zip(batch, out[:, longest:].tolist()):
            length = next((at + 1 for at, token in enumerate(answer) if token in end), len(answer))
            answers[i] = answer[:length]
        if on_done:
            on_done(len(batch))
    return [answers[i] for i in range(len(prompts))]


def check_peft() -> None:
    """Raise LoraError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise LoraError("peft is not installed: pip install 'headrift[train]'")


def check_lora(folder: Path, model: Path) -> None:
    """Raise LoraError unless the folder has a LoRA whose matrices fit the model's; reads headers only."""
    for name in (_ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise LoraError(f"--lora {folder} has no {name}: give the folder `adapter` of a finished training")
    try:
        config = json.loads((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
        adapter = _shapes(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError) as error:
        raise LoraError(f"--lora {folder} cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise LoraError(f"--lora {folder} is not a LoRA but {config.get('peft_type')}: give a LoRA")
    weights = {name: shape for path in sorted(model.glob("*.safetensors")) for name, shape in _shapes(path).items()}
    other_model = f"--lora {folder} is of another model"
    for name, shape in adapter.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if not match or not weights:
            continue
        matrix, (side, what) = match.group(1), (1, "inputs") if match.group(2) == "A" else (0, "outputs")
        base = weights.get(f"{matrix}.weight")
        if base is None:
            raise LoraError(f"{other_model}: {model} has no {matrix}")
        if base[side] != shape[side]:
            raise LoraError(f"{other_model}: its {matrix} has {shape[side]} {what}, and that of {model} {base[side]}")
    layers, model_layers = (
        {int(n) for name in names for n in re.findall(r"\.layers\.(\d+)\.", name)} for names in (adapter, weights)
    )
    if layers and model_layers and config.get("layers_to_transform") is None and layers != model_layers:
        raise LoraError(f"{other_model}: it has {len(layers)} layers, and {model} {len(model_layers)}")


def lora_fingerprint(folder: Path) -> str:
    """Hash of an adapter's settings and weights."""
    contents = ((folder / name).read_bytes() for name in (_ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return hashlib.sha256(b"".join(contents)).hexdigest()


def attach_lora(model: Any, rank: int, alpha: float, seed: int, start: Path | None = None) -> Any:
    """Add a LoRA to a model's attention matrices: a new one that changes nothing yet, or the one in `start`."""
    import peft
    import torch

    if start is not None:
        return peft.PeftModel.from_pretrained(model, str(start), is_trainable=True)
    torch.manual_seed(seed)
    where = {"target_modules": list(LORA_TARGETS), "task_type": "CAUSAL_LM", "bias": "none"}
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, **where))


def trainable_weights(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _shapes(path: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dict
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged ({error}): copy it again") from error
