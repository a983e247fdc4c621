"""The CPU mass kernel against the float64 oracle, over odd shapes, page maps, lengths and regions."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrift_kernels import reference
from headrift_kernels.cpu.span_mass import measured_queries, span_mass

# A dot product of head_dim float32 terms and a sum over the keys, both reassociated: a few 1e-7 relative. bfloat16
# inputs are exact in float32, so they get no wider band.
TOLERANCE = 2e-6


def make_case(rng, *, batch, kv_heads, group, head_dim, page, regions, dtype, longest=150, steps=5, layers=2):
    """A ragged batch of decode rows and prefill chunks over a shuffled page map; unused pages and keys are poisoned."""
    heads, slots = kv_heads * group, batch + 2
    prompt_len = rng.integers(1, longest, slots).astype(np.int32)
    seq_lens = np.array([rng.integers(1, longest + steps) for _ in range(batch)], np.int32)
    q_lens = np.array([rng.integers(1, n + 1) if rng.random() < 0.5 else 1 for n in seq_lens], np.int32)
    slot_of = rng.permutation(slots)[:batch].astype(np.int32)
    slot_of[rng.random(batch) < 0.25] = -1
    pages = int(-(-seq_lens.max() // page))
    blocks = batch * pages + 3
    table = rng.permutation(blocks)[: batch * pages].reshape(batch, pages).astype(np.int32)
    keys = torch.from_numpy(rng.standard_normal((blocks, page, kv_heads, head_dim), np.float32)).to(dtype)
    used = torch.zeros(blocks, page, dtype=torch.bool)
    for row in range(batch):
        for position in range(seq_lens[row]):
            used[table[row, position // page], position % page] = True
    keys[~used] = torch.nan
    query = torch.from_numpy(2 * rng.standard_normal((int(q_lens.sum()), heads, head_dim), np.float32)).to(dtype)
    bounds = np.sort(rng.integers(0, longest + 20, (slots, regions, 2)), axis=2).astype(np.int32)
    return {
        "mass": torch.full((slots, steps, layers, heads, regions), torch.nan),
        "query": query,
        "key_cache": keys,
        "block_table": torch.from_numpy(table),
        "query_start_loc": torch.from_numpy(np.concatenate([[0], q_lens.cumsum()]).astype(np.int32)),
        "seq_lens": torch.from_numpy(seq_lens),
        "row_slot": torch.from_numpy(slot_of),
        "prompt_len": torch.from_numpy(prompt_len),
        "n_rows": torch.from_numpy(rng.integers(0, steps + 3, slots).astype(np.int32)),
        "bounds": torch.from_numpy(bounds),
    }


def run(case, layer, **how):
    """The kernel's mass buffer; the K cache goes in as vLLM packs it on x86, [blocks, kv_heads, head_dim, page]."""
    mass = case["mass"].clone()
    names = ("query_start_loc", "seq_lens", "row_slot", "prompt_len", "n_rows")
    measured = measured_queries(*(case[name].numpy() for name in names), mass.shape[1])
    keys = case["key_cache"].permute(0, 2, 3, 1).contiguous()
    span_mass(mass, layer, case["query"], keys, case["block_table"], measured, case["bounds"], **how)
    return mass


def assert_agrees(case, layer=1, **how):
    found = run(case, layer, **how)
    arguments = {name: value for name, value in case.items() if name != "mass"}
    expected = reference.span_mass(case["mass"], layer, *arguments.values(), **how)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE, equal_nan=True)
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 6),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 16]),
    head_dim=st.sampled_from([32, 64, 80, 96, 128, 256]),
    page=st.sampled_from([16, 32, 64, 128]),
    regions=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.one_of(st.none(), st.integers(1, 60)),
    softcap=st.sampled_from([0.0, 5.0]),
    with_alibi=st.booleans(),
    with_sinks=st.booleans(),
)
def test_agrees_with_the_oracle(
    seed, batch, kv_heads, group, head_dim, page, regions, dtype, window, softcap, with_alibi, with_sinks
):
    rng = np.random.default_rng(seed)
    case = make_case(
        rng, batch=batch, kv_heads=kv_heads, group=group, head_dim=head_dim, page=page, regions=regions, dtype=dtype
    )
    heads = kv_heads * group
    assert_agrees(
        case,
        scale=head_dim**-0.5,
        window=window,
        softcap=softcap,
        alibi_slopes=torch.linspace(0.01, 0.3, heads) if with_alibi else None,
        sinks=torch.from_numpy(rng.standard_normal(heads).astype(np.float32)) if with_sinks else None,
    )


@pytest.fixture
def decode_case():
    """Three decode rows at step 2, all probed."""
    rng = np.random.default_rng(7)
    case = make_case(rng, batch=3, kv_heads=3, group=3, head_dim=64, page=32, regions=3, dtype=torch.float32, layers=3)
    case["row_slot"][:] = torch.tensor([4, 0, 2])
    case["query_start_loc"] = torch.arange(4, dtype=torch.int32)
    case["query"] = case["query"][:1].repeat(3, 1, 1).contiguous()
    case["prompt_len"][case["row_slot"].long()] = case["seq_lens"] - 2
    case["n_rows"][:] = 5
    return case


def test_writes_the_measured_cells_and_nothing_else(decode_case):
    mass = assert_agrees(decode_case, scale=0.125)
    written = ~torch.isnan(mass)
    expected = torch.zeros_like(written)
    expected[decode_case["row_slot"].long(), 2, 1] = True
    assert torch.equal(written, expected)


def test_a_batch_without_probed_rows_writes_nothing(decode_case):
    decode_case["row_slot"][:] = -1
    assert torch.isnan(run(decode_case, 1, scale=0.125)).all()


def test_the_whole_range_holds_mass_one_and_parts_add_up(decode_case):
    decode_case["bounds"][:, 0] = torch.tensor([0, 10_000])
    decode_case["bounds"][:, 1] = torch.tensor([0, 9])
    decode_case["bounds"][:, 2] = torch.tensor([9, 10_000])
    whole, left, right = run(decode_case, 0, scale=0.125)[decode_case["row_slot"].long(), 2, 0].unbind(-1)
    torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(left + right, whole, rtol=0, atol=TOLERANCE)


def test_one_key_that_holds_nearly_everything_does_not_drown_the_rest(decode_case):
    """A BOS-like sink key: the small masses keep their relative precision."""
    case = decode_case
    n = int(case["seq_lens"][0])
    first_page = case["block_table"][0, 0]
    case["key_cache"][first_page, 0] = case["query"][0, ::3] * 3.0
    case["bounds"][:, 1] = torch.tensor([1, n])
    found = run(case, 1, scale=0.125)[4, 2, 1, :, 1].double()
    arguments = {name: value for name, value in case.items() if name != "mass"}
    expected = reference.span_mass(case["mass"], 1, *arguments.values(), scale=0.125)[4, 2, 1, :, 1]
    assert (expected < 1e-3).any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)


def test_a_poisoned_key_that_is_attended_shows(decode_case):
    position = int(decode_case["seq_lens"][0]) - 1
    page, offset = divmod(position, 32)
    decode_case["key_cache"][decode_case["block_table"][0, page], offset] = torch.nan
    assert torch.isnan(run(decode_case, 1, scale=0.125)[4, 2, 1]).all()
