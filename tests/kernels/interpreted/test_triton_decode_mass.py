"""The fused decode kernels against the float64 oracle, over odd shapes, page maps, lengths, regions and types."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrift_kernels import reference
from headrift_kernels.triton.decode_mass import (
    CHUNK,
    MOST_PROGRAMS,
    SplitScratch,
    Tiles,
    decode_mass,
    splits_for,
)
from tools.cases import decode_case

# Masses come of float32 scores whatever the type: a dot product of exact products, and sums of up to a few thousand
# terms. Outputs of 16-bit types carry the rounding of the probabilities and of the output itself, at |v| up to 4.
MASS_TOLERANCE = 5e-6
OUTPUT_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ENTROPY_TOLERANCE = 2e-5
GUARD = 7.0


def guarded(shape, dtype=torch.float32, fill=torch.nan):
    """A tensor of `shape` in the middle of a larger one, and the function that tells whether the rest was touched."""
    size = int(np.prod(shape))
    whole = torch.full((size + 512,), GUARD, dtype=dtype)
    inner = whole[256 : 256 + size].view(shape)
    inner.fill_(fill)

    def untouched():
        return bool((whole[:256] == GUARD).all() and (whole[256 + size :] == GUARD).all())

    return inner, untouched


def run(case, *, splits=1, block_n=32, chunk=0, with_mass=True, with_entropy=True):
    """Output, masses and entropies as a call leaves them; fails if it wrote outside of its tensors."""
    tokens, heads, head_dim = case.query.shape
    rows = len(case.seq_lens)
    # the output's rows lie further apart than they are long: what is between must stay
    wide, output_untouched = guarded((tokens, heads + 1, head_dim), case.query.dtype, fill=GUARD)
    output = wide[:, :heads]
    mass, mass_untouched = guarded(case.mass_shape())
    entropy, entropy_untouched = guarded(case.mass_shape()[:4])
    scratch = None
    if splits > 1:
        scratch = SplitScratch.allocate(rows, heads, head_dim, case.bounds.shape[1], splits, "cpu")
        for part in (scratch.acc, scratch.stat, scratch.mass):
            part.fill_(torch.nan)  # parts that no split wrote must not be read
    how = {key: torch.tensor([x]) if key in ("k_scale", "v_scale") else x for key, x in case.how.items()}
    decode_mass(
        output,
        mass if with_mass else None,
        1,
        *case.batch,
        entropy=entropy if with_entropy else None,
        scratch=scratch,
        query_start_loc=case.query_start_loc,
        tiles=Tiles(block_n, 4, 2, chunk),
        **how,
    )
    assert output_untouched()
    assert mass_untouched()
    assert entropy_untouched()
    assert (wide[:, heads] == GUARD).all()
    return output, mass, entropy


def assert_agrees(case, **options):
    output, mass, entropy = run(case, **options)
    expected = reference.decode_mass(
        case.empty_mass(), 1, *case.batch, query_start_loc=case.query_start_loc, **case.how
    )
    tolerance = OUTPUT_TOLERANCE[case.query.dtype] * max(1.0, case.how.get("v_scale", 1.0))
    kept = expected.output.nan_to_num(GUARD)  # the tokens that another kernel attends for
    torch.testing.assert_close(output.double(), kept, rtol=0, atol=tolerance)
    torch.testing.assert_close(mass.double(), expected.mass, rtol=0, atol=MASS_TOLERANCE, equal_nan=True)
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=0, atol=ENTROPY_TOLERANCE, equal_nan=True)
    return output, mass


SHAPES = {
    "seed": st.integers(0, 2**32 - 1),
    "seq_lens": st.lists(st.integers(0, 150), min_size=1, max_size=3),
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
            (torch.float32, torch.float8_e4m3fn),
        ]
    ),
    "window": st.one_of(st.none(), st.integers(1, 90)),
    "softcap": st.sampled_from([0.0, 5.0]),
    "with_alibi": st.booleans(),
    "with_sinks": st.booleans(),
    "splits": st.sampled_from([1, 1, 2, 3, 8]),
    "block_n": st.sampled_from([16, 32, 64, 128]),
    "chunk": st.sampled_from([0, 64]),
    "mixed": st.booleans(),
}


def check_shapes(
    seed, types, kv_heads, group, with_alibi, with_sinks, splits, block_n, chunk, mixed, seq_lens, **shape
):
    rng = np.random.default_rng(seed)
    dtype, cache_dtype = types
    heads = kv_heads * group
    how = {
        "alibi_slopes": torch.linspace(0.01, 0.3, heads) if with_alibi else None,
        "sinks": torch.from_numpy(rng.standard_normal(heads).astype(np.float32)) if with_sinks else None,
    }
    if cache_dtype is not None:
        how |= {"k_scale": 0.5, "v_scale": 1.5}
    if mixed:  # decode rows, prefill chunks and padding
        shape["query_lens"] = [min(n, rng.choice([0, 1, 1, 2, 9, n])) for n in seq_lens]
    types = {"dtype": dtype, "cache_dtype": cache_dtype}
    case = decode_case(rng, seq_lens=seq_lens, kv_heads=kv_heads, group=group, **types, **shape, **how)
    assert_agrees(case, splits=splits, block_n=block_n, chunk=chunk)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**SHAPES)
def test_agrees_with_the_oracle(**shape):
    check_shapes(**shape)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**SHAPES)
def test_agrees_with_the_oracle_at_length(**shape):
    check_shapes(**shape)


@pytest.fixture
def chat():
    """Two rows of a chat whose regions are as a real one's: BOS and template outside of system and user."""
    case = decode_case(np.random.default_rng(3), seq_lens=[201, 203], unprobed=0.0)
    case.row_slot[:] = torch.tensor([3, 1])
    case.prompt_len[:] = 200
    case.n_rows[:] = 5
    case.bounds[:] = torch.tensor([[5, 70], [75, 190], [0, 200]])
    return case


@pytest.mark.parametrize("splits", [1, 3])
def test_taking_masses_leaves_the_output_bit_for_bit(chat, splits):
    plain, *_ = run(chat, splits=splits, with_mass=False)
    probed, mass, _ = run(chat, splits=splits)
    assert torch.equal(plain, probed)
    assert torch.isfinite(mass[3, 1, 1]).all()
    chat.row_slot[:] = -1
    unprobed, mass, entropy = run(chat, splits=splits)
    assert torch.equal(plain, unprobed)
    assert torch.isnan(mass).all()
    assert torch.isnan(entropy).all()


@pytest.mark.parametrize("splits", [1, 3])
def test_writes_the_step_of_the_position_and_nothing_else(chat, splits):
    _, mass = assert_agrees(chat, splits=splits)
    expected = torch.zeros_like(mass, dtype=torch.bool)
    expected[3, 1, 1] = expected[1, 3, 1] = True
    assert torch.equal(~torch.isnan(mass), expected)


@pytest.mark.parametrize(("prompt_len", "n_rows"), [(202, 5), (196, 5), (200, 1), (200, 0)])
def test_steps_outside_the_buffer_are_not_written(chat, prompt_len, n_rows):
    chat.prompt_len[3], chat.n_rows[3], chat.row_slot[1] = prompt_len, n_rows, -1
    assert torch.isnan(run(chat)[1]).all()


@pytest.mark.parametrize("splits", [1, 3])
def test_one_key_that_holds_nearly_everything_does_not_drown_the_rest(chat, splits):
    """A BOS-like key: the small masses keep their relative precision, wherever the bounds fall."""
    chat.key_cache[chat.block_table[0, 0], 0] = chat.query[0, ::3] * 3.0
    chat.bounds[:, 0] = torch.tensor([1, 201])
    chat.bounds[:, 1] = torch.tensor([64, 128])
    _, mass, _ = run(chat, splits=splits)
    expected = reference.decode_mass(chat.empty_mass(), 1, *chat.batch, **chat.how).mass[3, 1, 1]
    assert (expected[:, 0] < 1e-6).any()
    torch.testing.assert_close(mass[3, 1, 1].double(), expected, rtol=1e-4, atol=0)


def test_parts_of_the_keys_add_up_to_one(chat):
    chat.bounds[:, 0] = torch.tensor([0, 33])
    chat.bounds[:, 1] = torch.tensor([33, 10_000])
    chat.bounds[:, 2] = torch.tensor([-5, 1 << 30])
    left, right, whole = run(chat)[1][3, 1, 1].unbind(-1)
    torch.testing.assert_close(left + right, torch.ones_like(left), rtol=0, atol=MASS_TOLERANCE)
    torch.testing.assert_close(whole, torch.ones_like(left), rtol=0, atol=MASS_TOLERANCE)


def test_a_region_that_the_sliding_window_has_left_holds_nothing(chat):
    chat.how["window"] = 120
    _, mass = assert_agrees(chat)
    assert (mass[3, 1, 1, :, 0] == 0).all()
    assert (mass[3, 1, 1, :, 1] > 0).all()


def test_a_poisoned_key_that_is_attended_shows(chat):
    chat.key_cache[chat.block_table[0, 2], 3] = torch.nan
    output, mass, _ = run(chat)
    assert torch.isnan(output[0]).all()
    assert torch.isnan(mass[3, 1, 1]).all()
    assert torch.isfinite(output[1]).all()


def test_caches_past_two_to_the_31_elements():
    """Blocks so far apart that a 32-bit offset would wrap."""
    case = decode_case(np.random.default_rng(5), seq_lens=[40], kv_heads=2, dtype=torch.float16, unprobed=0.0)
    stride = 1_500_000_000
    for name in ("key_cache", "value_cache"):
        cache = getattr(case, name)
        far = torch.empty(stride * 4, dtype=cache.dtype)  # pages of memory that nothing touches cost nothing
        view = far.as_strided((4, *cache.shape[1:]), (stride, *cache.stride()[1:]))
        for block, present in zip((2, 3, 1), case.block_table[0]):
            view[block] = cache[present]
        setattr(case, name, view)
    case.block_table = torch.tensor([[2, 3, 1]], dtype=torch.int32)
    assert_agrees(case)


@pytest.mark.parametrize("splits", [1, 16])
@pytest.mark.parametrize("n", [2049, 131_072])
def test_long_contexts(n, splits):
    case = decode_case(
        np.random.default_rng(n), seq_lens=[n, 17], kv_heads=1, group=4, regions=8, dtype=torch.bfloat16, unprobed=0.0
    )
    case.n_rows[:] = 9
    assert_agrees(case, splits=splits, block_n=512)


@pytest.mark.parametrize(("rows", "regions"), [(1, 3), (2, 2)])
def test_scratch_for_a_smaller_batch_is_refused(chat, rows, regions):
    small = SplitScratch.allocate(rows, 6, 64, regions, 2, "cpu")
    with pytest.raises(ValueError, match="2 rows and 3 regions"):
        decode_mass(torch.empty_like(chat.query), chat.empty_mass(), 1, *chat.batch, scratch=small, **chat.how)


@pytest.fixture
def mixed():
    """A decode row, four prefill chunks (measured; past its last step; not probed; mid-prompt) and two padding rows."""
    seq_lens, query_lens = [130, 150, 90, 100, 70, 0, 0], [1, 40, 90, 30, 70, 0, 0]
    case = decode_case(np.random.default_rng(7), seq_lens=seq_lens, query_lens=query_lens, unprobed=0.0)
    case.row_slot[:] = torch.tensor([0, 1, 2, -1, 3, 4, -1])
    case.prompt_len[:5] = torch.tensor([128, 150, 84, 500, 0])
    case.n_rows[:] = 5
    return case


@pytest.mark.parametrize(("splits", "window"), [(1, None), (4, None), (4, 50)])
def test_a_mixed_batch_attends_decode_rows_and_measures_last_tokens(mixed, splits, window):
    mixed.how["window"] = window
    output, mass = assert_agrees(mixed, splits=splits)
    assert (output[1:] == GUARD).all()  # the outputs of prefill rows are another kernel's
    assert (output[0] != GUARD).all()
    written = {tuple(cell) for cell in (~torch.isnan(mass[:, :, 1, 0, 0])).nonzero().tolist()}
    assert written == {(0, 2), (1, 0)}
    plain, *_ = run(mixed, splits=splits, with_mass=False)
    assert torch.equal(plain, output)


def test_a_long_row_among_short_ones_uses_its_splits_and_they_one():
    """Parts are written for the long row alone; with chunks of 64 keys, 1,000 keys take 8 splits of 128."""
    case = decode_case(np.random.default_rng(2), seq_lens=[64, 1000, 33, 64], kv_heads=1, unprobed=0.0)
    case.n_rows[:] = 9
    assert_agrees(case, splits=8, chunk=64)
    scratch = SplitScratch.allocate(4, 3, 64, 3, 8, "cpu")
    for part in (scratch.acc, scratch.stat, scratch.mass):
        part.fill_(torch.nan)
    how = {**case.how, "scratch": scratch, "tiles": Tiles(32, 4, 2, 64)}
    decode_mass(torch.empty_like(case.query), case.empty_mass(), 1, *case.batch, **how)
    assert torch.isfinite(scratch.acc[1]).all()
    assert torch.isnan(scratch.acc[[0, 2, 3]]).all()


@given(st.integers(1, 1024), st.sampled_from([1, 3, 8, 32]), st.integers(1, 200_000), st.integers(1, 200))
def test_splits_are_as_many_as_the_longest_row_has_chunks_within_reason(rows, kv_heads, longest, processors):
    splits = splits_for(rows, kv_heads, longest, processors)
    assert splits in (1, 2, 4, 8, 16, 32)
    chunks = -(-longest // CHUNK)
    assert splits < 2 * chunks
    programs = rows * kv_heads * splits
    assert splits <= 4 or programs <= MOST_PROGRAMS * processors
    # not one more would help, or be cheap
    assert splits >= min(chunks, 32) or 2 * programs > MOST_PROGRAMS * processors
    assert splits >= min(chunks, 4)
