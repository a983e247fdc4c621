"""The losses and the attention rows under them, against transformers' eager attention and finite differences."""

import numpy as np
import pytest
import torch

from headrift.consistency import losses
from headrift.consistency.models import (
    RECOMPUTED_FROM,
    UnsupportedModelError,
    batch_by_length,
    forward,
    forward_batch,
    install,
    recompute_long_prompts,
)

KINDS = ("llama-3to1", "qwen3", "gemma3")


def load(folder, implementation, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=implementation).eval()


def ours(folder, dtype=torch.float32):
    model = load(folder, "sdpa", dtype)
    install(model)
    return model


def long_pair(make_pair):
    """Longer than Gemma-3's sliding window of 24, and with a core that the window cuts off from the tail."""
    return make_pair(3, before=30, after=20)


def query_weights(model):
    return [layer.self_attn.q_proj.weight for layer in model.model.layers]


def our_loss(model, pair, clean_model=None):
    at, to, first = torch.from_numpy(pair.clean_positions), torch.from_numpy(pair.wrapped_positions), pair.first_query
    layers = frozenset(range(3))
    with torch.no_grad():
        clean = forward((clean_model or model).base_model, pair.clean_ids, at[first:].tolist(), layers)
    wrapped = forward(model.base_model, pair.wrapped_ids, to[first:].tolist(), layers)
    return losses.attct(wrapped.rows, clean.rows, to, at)


def eager_loss(model, pair):
    """The same by the book, from full attention maps."""
    with torch.no_grad():
        clean = model(torch.tensor([pair.clean_ids]), output_attentions=True).attentions
    wrapped = model(torch.tensor([pair.wrapped_ids]), output_attentions=True).attentions
    aligned = list(zip(pair.clean_positions, pair.wrapped_positions))
    total = []
    for clean_map, own in zip(clean, wrapped, strict=True):
        for at, to in aligned[pair.first_query :]:
            target = torch.zeros(own.shape[1], own.shape[3], dtype=own.dtype)
            for clean_key, wrapped_key in aligned:
                target[:, wrapped_key] = clean_map[0, :, at, clean_key]
            total.append((own[0, :, to] - target).square().sum(-1))
    return torch.stack(total).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_eager_attention_and_the_model_is_as_before(kind, random_models, make_pair):
    pair = long_pair(make_pair)
    eager, plain, model = (
        load(random_models[kind], "eager"),
        load(random_models[kind], "sdpa"),
        ours(random_models[kind]),
    )
    ids, queries = pair.wrapped_ids, [3, 17, 40, len(pair.wrapped_ids) - 1]
    with torch.no_grad():
        expected = eager(torch.tensor([ids]), output_attentions=True)
        result = forward(model.base_model, ids, queries, frozenset({0, 2}), states=True, content=True)
        assert set(result.rows) == {0, 2}
        for layer, rows in result.rows.items():
            # Probabilities of two float32 computations: some 1e-7 relative in q and k, of scores of up to about 10.
            torch.testing.assert_close(rows, expected.attentions[layer][0][:, queries], rtol=0, atol=1e-5)
            assert rows.sum(-1).allclose(torch.ones(()), atol=1e-5)
        tokens = torch.tensor([ids])
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=0, atol=0)
        hidden = plain(tokens, output_hidden_states=True).hidden_states
        for layer, states in result.states.items():
            torch.testing.assert_close(states, hidden[layer + 1][0, queries], rtol=0, atol=0)
    assert {layer: content.shape[:2] for layer, content in result.contents.items()} == {
        layer: rows.shape[:2] for layer, rows in result.rows.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_one_pass_are_as_each_alone(kind, random_models, make_pair, assert_within_units):
    model = ours(random_models[kind])
    prompts = [long_pair(make_pair).wrapped_ids, make_pair(1).clean_ids, make_pair(2).wrapped_ids]
    assert len({len(ids) for ids in prompts}) == 3
    queries = [[len(ids) // 2, len(ids) - 1] for ids in prompts]
    with torch.no_grad():
        together = forward_batch(model.base_model, prompts, queries, frozenset({0, 1}), states=True, content=True)
        for result, ids, own_queries in zip(together, prompts, queries, strict=True):
            alone = forward(model.base_model, ids, own_queries, frozenset({0, 1}), states=True, content=True)
            assert result.last.shape == (len(ids), model.config.hidden_size)
            # The same sums in another order, by matrix products of another height. Each is off by some units, and the
            # layers add up theirs: up to 20 units on processors with AVX2 or AVX-512.
            assert_within_units(result.last, alone.last, 64)
            for own, target in (
                (result.rows, alone.rows),
                (result.states, alone.states),
                (result.contents, alone.contents),
            ):
                assert set(own) == set(target) == {0, 1}
                for layer in own:
                    assert_within_units(own[layer], target[layer], 64)


def test_which_prompts_run_together():
    assert batch_by_length([]) == []
    assert batch_by_length([100, 90, 110, 95]) == [[1, 3, 0, 2]]
    assert batch_by_length([300, 600, 200, 260]) == [[2], [3], [0], [1]]  # two of 260 are more than 512 tokens


def test_keep_is_the_divergence_of_what_was_from_what_is():
    torch.manual_seed(0)
    before, now = torch.randn(2, 5, 11, dtype=torch.float64)
    was, become = torch.softmax(before, -1), torch.softmax(now, -1)
    expected = (was * (was / become).log()).sum(-1).mean()
    torch.testing.assert_close(losses.keep(now, before), expected)
    assert float(losses.keep(before, before)) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_content_is_what_the_rows_gather(kind, random_models, make_pair, assert_within_units):
    pair, model, seen = make_pair(1), ours(random_models[kind]), []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        result = forward(model.base_model, pair.wrapped_ids, [4, 20], frozenset({1}), content=True)
    heads = seen[0][0, [4, 20]].unflatten(-1, (model.config.num_attention_heads, -1)).transpose(0, 1)
    assert_within_units(result.contents[1], heads, 64)  # sums of some 30 products in another order, as above


@pytest.mark.parametrize("kind", KINDS)
def test_attct_and_its_gradient_are_those_of_the_eager_implementation(kind, random_models, make_pair):
    pair = long_pair(make_pair)
    eager, model = load(random_models[kind], "eager"), ours(random_models[kind])
    own, target = our_loss(model, pair), eager_loss(eager, pair)
    assert float(own.detach()) > 1e-3
    torch.testing.assert_close(own, target, rtol=1e-5, atol=1e-7)
    for loss in (own, target):
        loss.backward()
    for result, expected in zip(query_weights(model), query_weights(eager), strict=True):
        scale = float(expected.grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(result.grad, expected.grad, rtol=0, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize("kind", ["llama-3to1", "gemma3"])
def test_long_prompts_are_computed_again_in_the_backward_pass(kind, random_models, make_pair):
    pair, gradients, passes = make_pair(4, before=220, after=40), [], []
    assert len(pair.wrapped_ids) > RECOMPUTED_FROM
    for again in (False, True):
        model, seen = ours(random_models[kind]), []
        if again:
            recompute_long_prompts(model)
        model.model.layers[1].self_attn.register_forward_hook(lambda *args, seen=seen: seen.append(1))
        our_loss(model, pair).backward()
        gradients.append([weight.grad for weight in query_weights(model)])
        passes.append(len(seen))
    assert passes == [2, 3]  # clean, wrapped, and wrapped again
    for result, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


class InFloat64(torch.overrides.TorchFunctionMode):
    """Norms and rotary embeddings that ask for float32, whatever the model's type, get float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.float:
            return args[0].double()
        wider = {torch.float32: torch.float64}
        args = tuple(wider.get(each, each) if isinstance(each, torch.dtype) else each for each in args)
        return function(*args, **{**kwargs, **({"dtype": torch.float64} if kwargs.get("dtype") in wider else {})})


@pytest.mark.parametrize("kind", KINDS)
def test_attct_gradient_is_the_finite_difference(kind, random_models, make_pair):
    pair = make_pair(5)
    model, before = ours(random_models[kind], torch.float64), ours(random_models[kind], torch.float64)
    with InFloat64():
        our_loss(model, pair, before).backward()
    random = np.random.default_rng(0)
    for weight in query_weights(model):
        direction = torch.from_numpy(random.standard_normal(weight.shape))
        direction /= direction.norm()
        slope = float((weight.grad * direction).sum())
        # Central differences in float64: an error of some step^2 = 1e-8 from the curve, 1e-16 / step from rounding.
        step, values = 1e-4, []
        for sign in (1, -1):
            with torch.no_grad(), InFloat64():
                weight += sign * step * direction
                values.append(float(our_loss(model, pair, before)))
                weight -= sign * step * direction
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-9)
        assert abs(slope) > 1e-7


def test_the_clean_side_has_no_gradient_and_equal_rows_have_no_loss():
    rows = {0: torch.rand(2, 3, 5, requires_grad=True)}
    clean = {0: torch.rand(2, 3, 4, requires_grad=True)}
    to, at = torch.tensor([0, 2, 4]), torch.tensor([0, 1, 3])
    losses.attct(rows, clean, to, at).backward()
    assert clean[0].grad is None
    assert rows[0].grad is not None
    same = torch.zeros(2, 3, 5).index_copy(2, to, clean[0].detach()[..., at])
    assert float(losses.attct({0: same}, clean, to, at)) == 0
    states = {1: torch.rand(3, 4, requires_grad=True)}
    assert float(losses.act(states, {1: states[1].detach()}).detach()) == 0


def test_attct_by_hand():
    wrapped = {7: torch.tensor([[[0.5, 0.2, 0.3]]]), 9: torch.tensor([[[1.0, 0.0, 0.0]]])}
    clean = {7: torch.tensor([[[0.6, 0.4]]]), 9: torch.tensor([[[1.0, 0.0]]])}
    to, at = torch.tensor([0, 2]), torch.tensor([0, 1])
    # (0.5 - 0.6)^2 + 0.2^2 + (0.3 - 0.4)^2 = 0.06 in layer 7, 0 in layer 9
    assert float(losses.attct(wrapped, clean, to, at)) == pytest.approx(0.03)
    squared = {layer: losses.squared_distance(wrapped[layer], clean[layer], to, at) for layer in wrapped}
    assert {layer: float(each) for layer, each in squared.items()} == pytest.approx({7: 0.06, 9: 0.0})


def test_bct_is_the_mean_surprise_at_the_answer():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    surprise = [-float(torch.log_softmax(row, -1)[token]) for row, token in zip(logits, (0, 0))]
    assert float(losses.bct(logits, torch.tensor([0, 0]))) == pytest.approx(sum(surprise) / 2)


def test_attention_that_is_more_than_softmax_is_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=16,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="softcap"):
        install(Gemma2ForCausalLM(config))
