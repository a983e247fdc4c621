"""Readings against a plain transformers forward of one row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from headrift.internals.comparing import (
    ATTENTION,
    COMPONENTS,
    MLP,
    RESIDUAL,
    ForwardRow,
    StateReader,
    UnsupportedModelError,
    find_components,
)
from headrift.internals.estimates import cosine, relative_l2

# Of a vector's length, and in nats: float32 sums in another order, whose rounding grows over three layers.
CLOSE = 1e-5


def assert_alike(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape
    assert relative_l2(one, other).max() < CLOSE


def assert_log_probs_alike(one: np.ndarray, other: np.ndarray) -> None:
    np.testing.assert_allclose(other, one, atol=CLOSE, rtol=CLOSE)


def rows_of(n: int, shared: int, seed: int = 0) -> list[ForwardRow]:
    """Rows of 211-token vocabulary, 12 to 60 tokens after a shared beginning; three points, two distributions."""
    random = np.random.default_rng(seed)
    head = random.integers(3, 211, shared).tolist()
    rows = []
    for _ in range(n):
        own = random.integers(3, 211, random.integers(12, 60)).tolist()
        end = shared + len(own)
        rows.append(ForwardRow([*head, *own], predict_at=(end - 4, end - 1), points=(shared + 2, shared + 7, end - 4)))
    return rows


def plain(model, row: ForwardRow):
    """States [points, layers, components, hidden] and log probabilities of a forward of this row alone.

    The residual stream is the library's own list of hidden states (but behind the last layer, where that has the final
    norm in it); attention and MLP outputs are taken by module name.
    """
    kept: dict[tuple[int, str], torch.Tensor] = {}

    def keeper(key):
        return lambda module, given, out: kept.update({key: out[0] if isinstance(out, tuple) else out})

    hooks = []
    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.self_attn.register_forward_hook(keeper((i, ATTENTION))))
        hooks.append(layer.mlp.register_forward_hook(keeper((i, MLP))))
    with torch.inference_mode():
        out = model(torch.tensor([row.token_ids]), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    for i in range(len(model.model.layers)):
        kept[i, RESIDUAL] = out.hidden_states[i + 1]
    at = list(row.points)
    states = [[kept[i, name][0, at] for name in COMPONENTS] for i in range(len(model.model.layers))]
    stacked = torch.stack([torch.stack(parts) for parts in states]).permute(2, 0, 1, 3)
    return stacked.numpy(), torch.log_softmax(out.logits[0, list(row.predict_at)].float(), -1).numpy()


@pytest.mark.parametrize("name", ["llama-3to1", "qwen3", "gemma3"])
@pytest.mark.parametrize("shared", [0, 37])
def test_readings_are_those_of_a_plain_forward(random_models, name, shared):
    rows = rows_of(5, shared)
    with StateReader(random_models[name]) as model:
        readings = model.read(rows)
    alone = transformers.AutoModelForCausalLM.from_pretrained(random_models[name], dtype=torch.float32).eval()
    norm = alone.model.norm
    for row, reading in zip(rows, readings):
        states, log_probs = plain(alone, row)
        assert_alike(states[:, :-1], reading.states[:, :-1])
        assert_alike(states[:, -1, 1:], reading.states[:, -1, 1:])
        with torch.inference_mode():
            normed = norm(torch.from_numpy(reading.states[:, -1, 0])).numpy()
        assert_alike(states[:, -1, 0], normed)
        assert_log_probs_alike(log_probs, reading.log_probs)


@pytest.mark.parametrize("name", ["llama-3to1", "qwen3", "gemma3"])
def test_padding_batch_size_and_sharing_change_nothing(random_models, name):
    rows = rows_of(7, 30, seed=1)
    with StateReader(random_models[name]) as model:
        ways = [model.read(rows, batch_tokens=n, share=share) for n, share in ((1, False), (1, True), (150, True))]
        ways.append(model.read(rows, batch_tokens=10_000, share=False))
    for way in ways[1:]:
        for one, other in zip(ways[0], way):
            assert_alike(one.states, other.states)
            assert_log_probs_alike(one.log_probs, other.log_probs)


def test_a_copied_row_is_the_same(random_models):
    (row,) = rows_of(1, 20)
    with StateReader(random_models["qwen3"]) as model:
        one, other = model.read([row, row])
    # The batch computes both alike up to rounding in the last place of float32.
    assert cosine(one.states, other.states).min() > 1 - 1e-10
    assert relative_l2(one.states, other.states).max() < 1e-5


def test_rows_are_counted_as_they_are_done(random_models):
    counts: list[int] = []
    with StateReader(random_models["llama-3to1"]) as model:
        model.read(rows_of(6, 0), counts.append, batch_tokens=100)
    assert sum(counts) == 6
    assert len(counts) > 1


def test_a_model_without_known_parts_is_refused():
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50, state_size=4)
    with pytest.raises(UnsupportedModelError, match="no list of 2 layers with an attention module"):
        find_components(transformers.MambaForCausalLM(config))


def test_other_families_have_their_parts_found():
    """Names differ by family: GPT-2's and Phi-2's are not Llama's."""
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "intermediate_size": 16,
    }
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50))
    neox = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**small))
    moe = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**small, num_key_value_heads=1, num_local_experts=2)
    )
    for model in (gpt2, neox, moe):
        parts = find_components(model)
        assert len(parts) == 2
        assert all(len(layer) == 3 for layer in parts)
