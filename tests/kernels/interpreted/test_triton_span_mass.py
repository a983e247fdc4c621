"""LSE of measured queries, and span mass from a LSE, against the float64 oracle: ragged batches of prefill chunks,
replays and decode rows.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrift_kernels.cases import span_case
from headrift_kernels.traffic import counted
from headrift_kernels.triton.query_lse import query_lse
from headrift_kernels.triton.span_mass import span_mass

# exp(score - LSE): a float32 score or LSE of size 30 is off by 2e-6, and so is a mass near 1, relatively.
TOLERANCE = 1e-5
GUARD = 7.0


def launched(kernel, *arguments, case, **options):
    k_scale = torch.tensor([case.k_scale]) if case.key_cache.element_size() == 1 else None
    kernel(*arguments, k_scale=k_scale, **{"block_n": 32, **options})


def run(case, **options):
    """Masses, from the case's LSE."""
    shape = case.empty_mass().shape
    whole = torch.full((case.empty_mass().numel() + 512,), GUARD)
    mass = whole[256:-256].view(shape)
    mass.fill_(torch.nan)
    launched(span_mass, mass, 1, *case.batch, case=case, **{**case.how, **options})
    assert (whole[:256] == GUARD).all()
    assert (whole[-256:] == GUARD).all()
    return mass


def run_lse(case, **options):
    """The LSE of measured queries; of the others, NaN. It is written into every third column of a larger matrix."""
    heads, tokens = case.lse.shape
    whole = torch.full((tokens + 2, 3 * (heads + 2)), GUARD)
    lse = whole.T[3:-3:3, 1:-1]
    launched(query_lse, lse, *case.lse_batch, case=case, **{**case.attention(), **options})
    found = lse.clone()
    lse.fill_(GUARD)
    assert (whole == GUARD).all()
    return found.where(found != GUARD, torch.nan)


def assert_agrees(case, **options):
    found = run(case, **options)
    torch.testing.assert_close(found.double(), case.expected(1), rtol=0, atol=TOLERANCE, equal_nan=True)
    return found


SHAPES = {
    "seed": st.integers(0, 2**32 - 1),
    "seq_lens": st.lists(st.integers(1, 120), min_size=1, max_size=3),
    "kv_heads": st.integers(1, 2),
    "group": st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16]),
    "head_dim": st.sampled_from([64, 80, 96, 128, 256]),
    "page": st.sampled_from([16, 32, 48, 64, 128]),
    "regions": st.integers(1, 8),
    "layout": st.sampled_from(["nhd", "hnd", "joint"]),
    "types": st.sampled_from(
        [
            (torch.float32, None),
            (torch.float16, None),
            (torch.bfloat16, None),
            (torch.bfloat16, torch.float8_e4m3fn),
            (torch.float16, torch.float8_e5m2),
        ]
    ),
    "steps": st.sampled_from([1, 5, 40]),
    "window": st.one_of(st.none(), st.integers(1, 90)),
    "softcap": st.sampled_from([0.0, 5.0]),
    "with_alibi": st.booleans(),
    "with_sinks": st.booleans(),
    "prompt_region": st.booleans(),
}


def case_of(seed, types, kv_heads, group, with_alibi, with_sinks, prompt_region, **shape):
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
    return case


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**SHAPES)
def test_masses_agree_with_the_oracle(**shape):
    assert_agrees(case_of(**shape))


def assert_lse_agrees(case, **options):
    lse = run_lse(case, **options)
    torch.testing.assert_close(lse.double(), case.expected_lse(), rtol=0, atol=TOLERANCE, equal_nan=True)
    return lse


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**SHAPES, block_n=st.sampled_from([16, 32, 64, 128]))
def test_lse_agrees_with_the_oracle_and_its_masses_do(block_n, **shape):
    case = case_of(**shape)
    case.lse = assert_lse_agrees(case, block_n=block_n)
    found = run(case)
    # twice the rounding: that of the LSE, and that of the scores
    torch.testing.assert_close(found.double(), case.expected(1), rtol=0, atol=2 * TOLERANCE, equal_nan=True)


@pytest.fixture
def replay():
    """One row: a prompt of 150 and an answer of 20 in one prefill, all of it measured."""
    case = span_case(np.random.default_rng(1), seq_lens=[170], query_lens=[170], steps=25, unprobed=0.0)
    slot = int(case.row_slot[0])
    case.prompt_len[slot], case.n_rows[slot] = 150, 25
    case.bounds[slot] = torch.tensor([[5, 40], [45, 140], [0, 150]])
    case.lse = case.expected_lse().float()
    return case, slot


def test_a_replay_is_recorded_from_one_prefill(replay):
    case, slot = replay
    mass = assert_agrees(case)
    assert torch.isfinite(mass[slot, :21, 1]).all()
    assert torch.isnan(mass[slot, 21:]).all()


def tensors_of(case):
    return {name: x for name, x in vars(case).items() if isinstance(x, torch.Tensor)}


def reads_of(case, keys):
    """How often each element of the key cache is read where every one of a row's `keys` is read that often."""
    reads = torch.zeros(case.key_cache.shape, dtype=torch.int64)
    for key, times in keys.items():
        reads[case.block_table[0, key // 16], key % 16] = times
    return reads


@pytest.mark.parametrize("prompt_region", [None, 2])
def test_reads_the_keys_of_the_regions_and_no_others(replay, prompt_region):
    case, slot = replay
    case.bounds[slot] = torch.tensor([[5, 40], [60, 61], [0, 150]])
    if prompt_region is None:
        case.bounds[slot, 2] = torch.tensor([0, 8])
    mass = case.empty_mass()
    with counted({"mass": mass, **tensors_of(case)}, per_element=("key_cache",)) as traffic:
        # all queries in one block, so that every key is read once
        span_mass(mass, 1, *case.batch, **{**case.how, "prompt_region": prompt_region}, max_query_len=21)
    read = torch.from_numpy(traffic.reads["key_cache"]).view(case.key_cache.shape)
    wanted = [*range(5, 40), 60, *(range(150, 170) if prompt_region is not None else range(8))]
    assert torch.equal(read, reads_of(case, dict.fromkeys(wanted, 1)))


@pytest.mark.parametrize(
    ("prompt_len", "window", "blocks"),
    [
        (150, None, [range(170)]),
        (140, None, [range(160), range(164)]),
        (150, 60, [range(90, 170)]),
        (140, 60, [range(80, 160), range(101, 164)]),
    ],
)
def test_lse_reads_the_keys_of_a_block_of_queries_once_and_no_value(replay, prompt_len, window, blocks):
    """A tile of 64 rows takes 21 steps of 3 heads. A read of anything but the tensors named here would raise."""
    case, slot = replay
    case.prompt_len[slot] = prompt_len
    lse = torch.full_like(case.lse, torch.nan)
    with counted({**tensors_of(case), "lse": lse}, per_element=("key_cache",)) as traffic:
        query_lse(lse, *case.lse_batch, **case.how, window=window)
    read = torch.from_numpy(traffic.reads["key_cache"]).view(case.key_cache.shape)
    assert torch.equal(read, reads_of(case, Counter(key for block in blocks for key in block)))
    measured = min(25, 170 - prompt_len + 1)
    assert traffic.stored == {"lse": 6 * measured * 4}
    assert traffic.loaded["query"] == 6 * measured * 64 * 4


def test_lse_of_a_first_token_whose_prompt_comes_in_chunks(replay):
    """The last chunk holds one measured query; its context is in the cache."""
    case, slot = replay
    case.n_rows[slot], case.seq_lens[0] = 1, 150
    case.query, case.query_start_loc[1] = case.query[:20], 20
    case.lse = case.lse[:, :20]
    lse = assert_lse_agrees(case, max_query_len=20)
    assert torch.isfinite(lse[:, 19]).all()
    assert torch.isnan(lse[:, :19]).all()


def test_a_sink_far_above_every_score_takes_it_all(replay):
    """exp(sink - the largest score) would overflow."""
    case, _ = replay
    case.how["sinks"] = torch.full((6,), 200.0)
    assert_lse_agrees(case)


def test_a_poisoned_key_that_is_attended_shows(replay):
    case, _ = replay
    case.key_cache[case.block_table[0, 10], 0] = torch.nan
    lse = run_lse(case)
    assert torch.isfinite(lse[:, 149:160]).all()  # key 160 comes after these queries
    assert torch.isnan(lse[:, 160:]).all()


def test_caches_past_two_to_the_31_elements():
    """Blocks so far apart that a 32-bit offset would wrap."""
    case = span_case(np.random.default_rng(5), seq_lens=[40], query_lens=[6], dtype=torch.float16, unprobed=0.0)
    case.prompt_len[:], case.n_rows[:] = 37, 5
    stride = 1_500_000_000
    far = torch.empty(stride * 4, dtype=torch.float16)  # pages of memory that nothing touches cost nothing
    view = far.as_strided((4, *case.key_cache.shape[1:]), (stride, *case.key_cache.stride()[1:]))
    for block, there in zip((2, 3, 1), case.block_table[0]):
        view[block] = case.key_cache[there]
    case.key_cache = view
    case.block_table = torch.tensor([[2, 3, 1]], dtype=torch.int32)
    case.lse = assert_lse_agrees(case)
    assert_agrees(case)


def test_rows_that_are_not_probed_read_and_write_nothing(replay):
    case, _ = replay
    case.row_slot[:] = -1
    mass, lse = case.empty_mass(), torch.full_like(case.lse, torch.nan)
    with counted({"mass": mass, "lse": lse, "row_slot": case.row_slot}) as traffic:
        span_mass(mass, 1, *case.batch, **case.how)
        query_lse(lse, *case.lse_batch, **case.how)
    assert traffic.total("mass", "lse") == 0
    assert torch.isnan(mass).all()
    assert torch.isnan(lse).all()


def test_small_masses_keep_their_relative_precision(replay):
    """A BOS-like key that holds nearly everything."""
    case, slot = replay
    case.key_cache[case.block_table[0, 0], 0] = case.query[-1, ::3] * 1.5
    case.lse = case.expected_lse().float()
    case.bounds[slot, 0] = torch.tensor([1, 150])
    found, expected = run(case)[slot, 20, 1, :, 0].double(), case.expected(1)[slot, 20, 1, :, 0]
    assert (expected < 1e-6).any()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-12)
