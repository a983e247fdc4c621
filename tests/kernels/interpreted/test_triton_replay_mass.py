"""Masses of the queries of prefill rows against the float64 oracle: chunks, replays and decode rows in one batch."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrift_kernels import reference
from headrift_kernels.triton.decode_mass import CHUNK, Tiles, decode_mass
from headrift_kernels.triton.replay_mass import ReplayScratch, block_rows, replay_mass, replay_splits
from tools.cases import decode_case
from tools.traffic import counted

# As for decode: float32 scores, and sums of up to a few hundred terms.
MASS_TOLERANCE = 5e-6
ENTROPY_TOLERANCE = 2e-5
GUARD = 7.0


def guarded(shape):
    """A tensor of NaN in the middle of a larger one, and the function that tells whether the rest was touched."""
    size = int(np.prod(shape))
    whole = torch.full((size + 512,), GUARD)
    inner = whole[256 : 256 + size].view(shape).fill_(torch.nan)
    return inner, lambda: bool((whole[:256] == GUARD).all() and (whole[256 + size :] == GUARD).all())


def run(case, *, splits=1, block_n=32, chunk=0, most_queries=None, with_entropy=True):
    """Masses and entropies as a call leaves them; fails if it wrote outside of its tensors."""
    rows, heads = len(case.seq_lens), case.query.shape[1]
    most_queries = most_queries or max(1, int(case.query_start_loc.diff().max()))
    mass, mass_untouched = guarded(case.mass_shape())
    entropy, entropy_untouched = guarded(case.mass_shape()[:4])
    scratch = None
    if splits > 1:
        scratch = ReplayScratch.allocate(rows, most_queries, heads, case.bounds.shape[1], splits, "cpu")
        scratch.stat.fill_(torch.nan)  # parts that no split wrote must not be read
        scratch.mass.fill_(torch.nan)
    how = {key: torch.tensor([x]) if key == "k_scale" else x for key, x in case.how.items()}
    replay_mass(
        mass,
        1,
        *case.replay_batch,
        most_queries=most_queries,
        entropy=entropy if with_entropy else None,
        scratch=scratch,
        tiles=Tiles(block_n, 4, 2, chunk),
        **how,
    )
    assert mass_untouched()
    assert entropy_untouched()
    return mass, entropy


def expected_of(case):
    return reference.replay_mass(case.empty_mass(), 1, *case.replay_batch, **case.how)


def assert_agrees(case, **options):
    mass, entropy = run(case, **options)
    expected = expected_of(case)
    torch.testing.assert_close(mass.double(), expected.mass, rtol=0, atol=MASS_TOLERANCE, equal_nan=True)
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=0, atol=ENTROPY_TOLERANCE, equal_nan=True)
    return mass


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
    splits=st.sampled_from([1, 2, 3, 8]),
    block_n=st.sampled_from([16, 32, 64, 128]),
    chunk=st.sampled_from([0, 64]),
)
def test_agrees_with_the_oracle(
    seed, types, kv_heads, group, with_alibi, with_sinks, splits, block_n, chunk, seq_lens, **shape
):
    rng = np.random.default_rng(seed)
    dtype, cache_dtype = types
    heads = kv_heads * group
    how = {
        "alibi_slopes": torch.linspace(0.01, 0.3, heads) if with_alibi else None,
        "sinks": torch.from_numpy(rng.standard_normal(heads).astype(np.float32)) if with_sinks else None,
    }
    if cache_dtype is not None:
        how["k_scale"] = 0.5
    query_lens = [min(n, rng.choice([1, 3, 20, n])) for n in seq_lens]
    types = {"dtype": dtype, "cache_dtype": cache_dtype}
    lens = {"seq_lens": seq_lens, "query_lens": query_lens}
    case = decode_case(rng, kv_heads=kv_heads, group=group, **lens, **types, **shape, **how)
    assert_agrees(case, splits=splits, block_n=block_n, chunk=chunk)


@pytest.fixture
def replay():
    """One row: a prompt of 150 and an answer of 20 in one prefill, all of it measured."""
    case = decode_case(np.random.default_rng(1), seq_lens=[170], query_lens=[170], steps=25, unprobed=0.0)
    slot = int(case.row_slot[0])
    case.prompt_len[slot], case.n_rows[slot] = 150, 25
    case.bounds[slot] = torch.tensor([[5, 40], [45, 140], [0, 150]])
    return case, slot


@pytest.mark.parametrize("splits", [1, 4])
def test_a_replay_is_recorded_from_one_prefill_and_its_last_query_by_decode_mass(replay, splits):
    case, slot = replay
    mass = assert_agrees(case, splits=splits)
    assert torch.isfinite(mass[slot, :20, 1]).all()
    assert torch.isnan(mass[slot, 20:]).all()
    assert torch.isnan(mass[:, :, 0]).all()
    output = torch.full_like(case.query, GUARD)
    decode_mass(output, mass, 1, *case.batch, query_start_loc=case.query_start_loc, **case.how)
    assert torch.isfinite(mass[slot, :21, 1]).all()
    assert (output == GUARD).all()


def test_decode_rows_padding_and_rows_that_are_not_probed_are_left_alone():
    """Beside a replay; the padding row's slot is the one of a request that is over."""
    case = decode_case(np.random.default_rng(3), seq_lens=[60, 80, 50, 0], query_lens=[1, 20, 20, 0], unprobed=0.0)
    case.row_slot[:] = torch.tensor([0, 1, -1, 2])
    case.prompt_len[:4] = torch.tensor([58, 70, 45, 1])
    case.n_rows[:] = 5
    mass = assert_agrees(case)
    written = {tuple(cell) for cell in (~torch.isnan(mass[:, :, 1, 0, 0])).nonzero().tolist()}
    assert written == {(1, step) for step in range(5)}


def test_queries_past_the_bound_are_not_measured(replay):
    case, slot = replay
    mass, _ = run(case, splits=4, most_queries=7)
    assert torch.isfinite(mass[slot, :7, 1]).all()
    assert torch.isnan(mass[slot, 7:]).all()


@pytest.mark.parametrize("splits", [1, 4])
def test_masses_are_the_same_with_and_without_entropy(replay, splits):
    case, _ = replay
    assert torch.equal(*(run(case, splits=splits, with_entropy=entropy)[0].nan_to_num() for entropy in (False, True)))


def reads_of(case, keys):
    """How often each element of the key cache is read if each of row 0's `keys` is read that often."""
    reads = torch.zeros(case.key_cache.shape, dtype=torch.int64)
    for key, times in keys.items():
        reads[case.block_table[0, key // 16], key % 16] = times
    return reads


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("prompt_len", "window", "blocks"),
    [
        (150, None, [range(169)]),
        (140, None, [range(160), range(164)]),
        (150, 60, [range(90, 169)]),
        (140, 60, [range(80, 160), range(101, 164)]),
    ],
)
def test_reads_the_keys_of_a_block_of_queries_once_and_no_value(replay, prompt_len, window, blocks, splits):
    """A tile of 64 rows takes 21 steps of 3 heads. A read of anything but the tensors named here would raise."""
    case, slot = replay
    case.prompt_len[slot] = prompt_len
    mass = case.empty_mass()
    tensors = {name: x for name, x in vars(case).items() if isinstance(x, torch.Tensor) and name != "value_cache"}
    scratch = ReplayScratch.allocate(1, 25, 6, 3, splits, "cpu") if splits > 1 else None
    tensors |= {f"scratch_{name}": x for name, x in vars(scratch).items()} if scratch else {}
    how = {**case.how, "window": window, "scratch": scratch, "tiles": Tiles(32, 4, 2, 32)}
    with counted({**tensors, "mass": mass}, per_element=("key_cache",)) as traffic:
        replay_mass(mass, 1, *case.replay_batch, most_queries=25, **how)
    read = torch.from_numpy(traffic.reads["key_cache"]).view(case.key_cache.shape)
    assert torch.equal(read, reads_of(case, Counter(key for block in blocks for key in block)))
    measured = min(25, 170 - prompt_len)
    assert traffic.stored["mass"] == 6 * measured * 3 * 4
    if splits == 1:
        assert set(traffic.stored) == {"mass"}
        assert traffic.loaded["query"] == 6 * measured * 64 * 4


def test_a_sink_far_above_every_score_takes_it_all(replay):
    """exp(sink - the largest score) would overflow."""
    case, _ = replay
    case.how["sinks"] = torch.full((6,), 200.0)
    assert_agrees(case)
    assert_agrees(case, splits=4)


def test_a_poisoned_key_that_is_attended_shows(replay):
    case, slot = replay
    case.key_cache[case.block_table[0, 10], 0] = torch.nan
    mass, _ = run(case)
    assert torch.isfinite(mass[slot, :11, 1]).all()  # key 160 comes after these queries
    assert torch.isnan(mass[slot, 11:]).all()


def test_caches_past_two_to_the_31_elements():
    """Blocks so far apart that a 32-bit offset would wrap."""
    case = decode_case(np.random.default_rng(5), seq_lens=[40], query_lens=[6], dtype=torch.float16, unprobed=0.0)
    case.prompt_len[:], case.n_rows[:] = 36, 5
    stride = 1_500_000_000
    far = torch.empty(stride * 4, dtype=torch.float16)  # pages of memory that nothing touches cost nothing
    view = far.as_strided((4, *case.key_cache.shape[1:]), (stride, *case.key_cache.stride()[1:]))
    for block, page in zip((2, 3, 1), case.block_table[0]):
        view[block] = case.key_cache[page]
    case.key_cache = view
    case.block_table = torch.tensor([[2, 3, 1]], dtype=torch.int32)
    assert torch.isfinite(assert_agrees(case)[case.row_slot[0], :4, 1]).all()


def test_rows_that_are_not_probed_read_and_write_nothing(replay):
    case, _ = replay
    case.row_slot[:] = -1
    mass = case.empty_mass()
    with counted({"mass": mass, "row_slot": case.row_slot}) as traffic:
        replay_mass(mass, 1, *case.replay_batch, most_queries=25, **case.how)
    assert traffic.total("mass") == 0
    assert torch.isnan(mass).all()


@pytest.mark.parametrize("splits", [1, 4])
def test_one_key_that_holds_nearly_everything_does_not_drown_the_rest(replay, splits):
    """A BOS-like key: the small masses keep their relative precision."""
    case, slot = replay
    case.key_cache[case.block_table[0, 0], 0] = case.query[-2, ::3] * 1.5
    case.bounds[slot, 0] = torch.tensor([1, 150])
    mass, expected = run(case, splits=splits)[0][slot, 19, 1, :, 0].double(), expected_of(case).mass[slot, 19, 1, :, 0]
    assert (expected < 1e-6).any()
    torch.testing.assert_close(mass, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("rows", "queries", "regions"), [(0, 25, 3), (1, 24, 3), (1, 25, 2)])
def test_scratch_for_a_smaller_batch_is_refused(replay, rows, queries, regions):
    case, _ = replay
    small = ReplayScratch.allocate(rows, queries, 6, regions, 2, "cpu")
    with pytest.raises(ValueError, match="1 rows of 25 queries and 3 regions"):
        replay_mass(case.empty_mass(), 1, *case.replay_batch, most_queries=170, scratch=small, **case.how)


@given(
    st.integers(1, 512),
    st.sampled_from([1, 8]),
    st.sampled_from([1, 3, 4, 16]),
    st.integers(1, 200),
    st.integers(1, 200_000),
    st.integers(1, 200),
)
def test_splits_fill_the_processors_and_are_not_too_short(rows, kv_heads, group, queries, longest, processors):
    splits = replay_splits(rows, kv_heads, group, queries, longest, processors)
    assert splits in (1, 2, 4, 8, 16, 32)
    assert splits < 2 * -(-longest // CHUNK)
    programs = rows * kv_heads * -(-queries // (block_rows(group, queries) // group)) * splits
    assert splits == 1 or programs < 4 * processors
    assert programs >= 2 * processors or splits >= min(-(-longest // CHUNK), 32)
