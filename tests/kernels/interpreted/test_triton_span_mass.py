"""Span mass from an LSE against the float64 oracle: prefill chunks, replays and decode rows in one ragged batch."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrift_kernels import reference
from headrift_kernels.cases import span_case
from headrift_kernels.traffic import counted
from headrift_kernels.triton.span_mass import span_mass

# exp(score - LSE): a float32 score or LSE of size 30 is off by 2e-6, and so is a mass near 1, relatively.
TOLERANCE = 1e-5
GUARD = 7.0


def run(case, **options):
    shape = case.empty_mass().shape
    whole = torch.full((case.empty_mass().numel() + 512,), GUARD)
    mass = whole[256:-256].view(shape)
    mass.fill_(torch.nan)
    k_scale = torch.tensor([case.k_scale]) if case.key_cache.element_size() == 1 else None
    span_mass(mass, 1, *case.batch, k_scale=k_scale, **{"block_n": 32, **case.how, **options})
    assert (whole[:256] == GUARD).all()
    assert (whole[-256:] == GUARD).all()
    return mass


def assert_agrees(case, **options):
    found = run(case, **options)
    torch.testing.assert_close(found.double(), case.expected(1), rtol=0, atol=TOLERANCE, equal_nan=True)
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    seq_lens=st.lists(st.integers(1, 120), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16]),
    head_dim=st.sampled_from([64, 80, 96, 128, 256]),
    page=st.sampled_from([16, 32, 48, 64, 128]),
    regions=st.integers(1, 8),
    layout=st.sampled_from(["nhd", "hnd", "joint"]),
    types=st.sampled_from(
        [
            (torch.float32, None),
            (torch.float16, None),
            (torch.bfloat16, None),
            (torch.bfloat16, torch.float8_e4m3fn),
            (torch.float16, torch.float8_e5m2),
        ]
    ),
    steps=st.sampled_from([1, 5, 40]),
    window=st.one_of(st.none(), st.integers(1, 90)),
    softcap=st.sampled_from([0.0, 5.0]),
    with_alibi=st.booleans(),
    with_sinks=st.booleans(),
    prompt_region=st.booleans(),
)
def test_agrees_with_the_oracle(seed, types, kv_heads, group, with_alibi, with_sinks, prompt_region, **shape):
    rng = np.random.default_rng(seed)
    dtype, cache_dtype = types
    heads = kv_heads * group
    how = {
        "alibi_slopes": torch.linspace(0.01, 0.3, heads) if with_alibi else None,
        "sinks": torch.from_numpy(rng.standard_normal(heads).astype(np.float32)) if with_sinks else None,
    }
    k_scale = 1.0 if cache_dtype is None else 0.5
    case = span_case(
        rng, kv_heads=kv_heads, group=group, dtype=dtype, cache_dtype=cache_dtype, k_scale=k_scale, **shape, **how
    )
    if prompt_region:
        region = int(rng.integers(0, case.bounds.shape[1]))
        case.bounds[:, region, 0], case.bounds[:, region, 1] = 0, case.prompt_len
        case.how["prompt_region"] = region
    assert_agrees(case)


@pytest.fixture
def replay():
    """One row: a prompt of 150 and an answer of 20 in one prefill, all of it measured."""
    case = span_case(np.random.default_rng(1), seq_lens=[170], query_lens=[170], steps=25, unprobed=0.0)
    slot = int(case.row_slot[0])
    case.prompt_len[slot], case.n_rows[slot] = 150, 25
    case.bounds[slot] = torch.tensor([[5, 40], [45, 140], [0, 150]])
    return with_lse(case), slot


def with_lse(case):
    """The LSE anew, after the replay was changed by hand."""
    keys = case.keys()
    for n in range(150, 171):
        attended = reference.paged_keys(keys, case.block_table[0], n)
        case.lse[:, n - 1] = reference.attend(case.query[n - 1], attended, attended, **case.how).lse.float()
    return case


def test_a_replay_is_recorded_from_one_prefill(replay):
    case, slot = replay
    mass = assert_agrees(case)
    assert torch.isfinite(mass[slot, :21, 1]).all()
    assert torch.isnan(mass[slot, 21:]).all()


@pytest.mark.parametrize("prompt_region", [None, 2])
def test_reads_the_keys_of_the_regions_and_no_others(replay, prompt_region):
    case, slot = replay
    case.bounds[slot] = torch.tensor([[5, 40], [60, 61], [0, 150]])
    if prompt_region is None:
        case.bounds[slot, 2] = torch.tensor([0, 8])
    mass = case.empty_mass()
    tensors = {
        "mass": mass,
        **{name: getattr(case, name) for name in ("query", "key_cache", "lse", "block_table", "query_start_loc")},
        **{name: getattr(case, name) for name in ("seq_lens", "row_slot", "prompt_len", "n_rows", "bounds")},
    }
    with counted(tensors, per_element=("key_cache",)) as traffic:
        # all queries in one block, so that every key is read once
        span_mass(mass, 1, *case.batch, **{**case.how, "prompt_region": prompt_region}, max_query_len=21)
    read = torch.from_numpy(traffic.reads["key_cache"]).view(case.key_cache.shape)
    expected = torch.zeros_like(read)
    wanted = {*range(5, 40), 60, *(range(150, 170) if prompt_region is not None else range(8))}
    for key in wanted:
        expected[case.block_table[0, key // 16], key % 16] = 1
    assert torch.equal(read, expected)


def test_rows_that_are_not_probed_read_and_write_nothing(replay):
    case, _ = replay
    case.row_slot[:] = -1
    mass = case.empty_mass()
    with counted({"mass": mass, "row_slot": case.row_slot}) as traffic:
        span_mass(mass, 1, *case.batch, **case.how)
    assert traffic.total("mass") == 0
    assert torch.isnan(mass).all()


def test_small_masses_keep_their_relative_precision(replay):
    """A BOS-like key that holds nearly everything."""
    case, slot = replay
    case.key_cache[case.block_table[0, 0], 0] = case.query[-1, ::3] * 1.5
    with_lse(case)
    case.bounds[slot, 0] = torch.tensor([1, 150])
    found, expected = run(case)[slot, 20, 1, :, 0].double(), case.expected(1)[slot, 20, 1, :, 0]
    assert (expected < 1e-6).any()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-12)
