"""The CPU attention kernel against the float64 oracle, over odd shapes, page maps, lengths, regions and threads."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrift_kernels import reference
from headrift_kernels.cpu.paged_attention import PagedAttention
from headrift_kernels.cpu.queries import KEYS, ROW, SLOT, STEP, TOKEN, Queries, measured_queries

# Masses: a dot product of head_dim float32 terms and a sum over the keys, both reassociated: a few 1e-7 relative.
# bfloat16 inputs are exact in float32, so they get no wider band. Outputs are sums of values of about 1 with weights
# that sum to 1; a bfloat16 output is rounded to 8 bits.
MASS_TOLERANCE = 2e-6
# An entropy weighs those errors of the probabilities with their logarithms, of up to some 20.
ENTROPY_TOLERANCE = 1e-5
OUTPUT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-8}


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
    shape = (blocks, page, kv_heads, head_dim)
    keys, values = (torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype) for _ in range(2))
    used = torch.zeros(blocks, page, dtype=torch.bool)
    for row in range(batch):
        for position in range(seq_lens[row]):
            used[table[row, position // page], position % page] = True
    keys[~used] = torch.nan
    values[~used] = torch.inf
    query = torch.from_numpy(2 * rng.standard_normal((int(q_lens.sum()), heads, head_dim), np.float32)).to(dtype)
    bounds = np.sort(rng.integers(0, longest + 20, (slots, regions, 2)), axis=2).astype(np.int32)
    return {
        "mass": torch.full((slots, steps, layers, heads, regions), torch.nan),
        "query": query,
        "keys": keys,
        "values": values,
        "block_table": torch.from_numpy(table),
        "query_start_loc": torch.from_numpy(np.concatenate([[0], q_lens.cumsum()]).astype(np.int32)),
        "seq_lens": torch.from_numpy(seq_lens),
        "row_slot": torch.from_numpy(slot_of),
        "prompt_len": torch.from_numpy(prompt_len),
        "n_rows": torch.from_numpy(rng.integers(0, steps + 3, slots).astype(np.int32)),
        "bounds": torch.from_numpy(bounds),
    }


def packed(case) -> torch.Tensor:
    """The KV cache as vLLM lays it out on x86: per (block, KV head) K as [head_dim, page], V as [page, head_dim]."""
    keys, values = case["keys"].permute(0, 2, 3, 1), case["values"].permute(0, 2, 1, 3)
    blocks, kv_heads, head_dim, page = keys.shape
    halves = [half.reshape(blocks, kv_heads, head_dim * page) for half in (keys, values)]
    return torch.cat(halves, 2).reshape(blocks, kv_heads, page, 2 * head_dim).contiguous()


def run(case, layer=1, decode_rows=True, with_output=True, threads=None, entropy=None, **how):
    """The kernel's mass buffer, its output (NaN where it wrote none) and the queries it was given. entropy: a buffer it
    is to write to."""
    mass, output = case["mass"].clone(), torch.full_like(case["query"], torch.nan)
    names = ("query_start_loc", "seq_lens", "row_slot", "prompt_len", "n_rows")
    table = measured_queries(*(case[name].numpy() for name in names), mass.shape[1], decode_rows)
    if len(table):
        queries = Queries.from_table(table, case["keys"].shape[1])
        attention = PagedAttention(mass, layer, packed(case), case["bounds"], entropy=entropy, **how)
        into = output if with_output else None
        attention.attend(case["query"], case["block_table"], queries, output=into, threads=threads)
    return mass, output, table


def assert_agrees(case, layer=1, *, decode_rows=True, with_output=True, threads=None, **how):
    entropy = torch.full(case["mass"].shape[:4], torch.nan)
    mass, output, table = run(case, layer, decode_rows, with_output, threads=threads, entropy=entropy, **how)
    without = run(case, layer, decode_rows, with_output, threads=threads, **how)
    for measured, other in zip((mass, output), without[:2], strict=True):
        assert torch.equal(measured.nan_to_num(9), other.nan_to_num(9)), "entropies change another number"
    entropies = torch.full_like(entropy, torch.nan).double()
    expected, attended = case["mass"].double(), torch.full_like(case["query"], torch.nan).double()
    for query in table:
        keys, values = (
            reference.paged_keys(case[name], case["block_table"][query[ROW]], int(query[KEYS]))
            for name in ("keys", "values")
        )
        seen = reference.attend(case["query"][query[TOKEN]], keys, values, **how)
        if with_output:
            attended[query[TOKEN]] = seen.output
        if query[SLOT] >= 0:
            entropies[query[SLOT], query[STEP], layer] = seen.entropy()
            for region, (start, end) in enumerate(case["bounds"][query[SLOT]].tolist()):
                expected[query[SLOT], query[STEP], layer, :, region] = seen.mass(start, end)
    torch.testing.assert_close(mass.double(), expected, rtol=0, atol=MASS_TOLERANCE, equal_nan=True)
    torch.testing.assert_close(entropy.double(), entropies, rtol=0, atol=ENTROPY_TOLERANCE, equal_nan=True)
    tolerance = OUTPUT_TOLERANCE[case["query"].dtype]
    torch.testing.assert_close(output.double(), attended, rtol=tolerance, atol=tolerance, equal_nan=True)
    return mass


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 6),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 16]),
    head_dim=st.sampled_from([32, 64, 80, 96, 128, 256]),
    page=st.sampled_from([16, 32, 48, 64, 128]),
    regions=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.one_of(st.none(), st.integers(1, 60)),
    softcap=st.sampled_from([0.0, 5.0]),
    with_alibi=st.booleans(),
    with_sinks=st.booleans(),
    decode_rows=st.booleans(),
    with_output=st.booleans(),
    threads=st.sampled_from([1, 2, 3, 7]),
)
def test_agrees_with_the_oracle(
    seed,
    batch,
    kv_heads,
    group,
    head_dim,
    page,
    regions,
    dtype,
    window,
    softcap,
    with_alibi,
    with_sinks,
    decode_rows,
    with_output,
    threads,
):
    rng = np.random.default_rng(seed)
    case = make_case(
        rng, batch=batch, kv_heads=kv_heads, group=group, head_dim=head_dim, page=page, regions=regions, dtype=dtype
    )
    heads = kv_heads * group
    assert_agrees(
        case,
        decode_rows=decode_rows,
        with_output=with_output,
        threads=threads,
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


def test_rows_that_are_not_probed_are_attended_alike(decode_case):
    """Bit for bit the output that a measured row has, and no mass."""
    _, measured, _ = run(decode_case, scale=0.125)
    decode_case["row_slot"][:] = -1
    mass, output, table = run(decode_case, scale=0.125)
    assert (table[:, SLOT] == -1).all()
    assert torch.isnan(mass).all()
    assert torch.equal(output, measured)
    _, output, table = run(decode_case, decode_rows=False, scale=0.125)
    assert len(table) == 0
    assert torch.isnan(output).all()


def test_the_whole_range_holds_mass_one_and_parts_add_up(decode_case):
    decode_case["bounds"][:, 0] = torch.tensor([0, 10_000])
    decode_case["bounds"][:, 1] = torch.tensor([0, 9])
    decode_case["bounds"][:, 2] = torch.tensor([9, 10_000])
    mass, _, _ = run(decode_case, 0, scale=0.125)
    whole, left, right = mass[decode_case["row_slot"].long(), 2, 0].unbind(-1)
    torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0, atol=MASS_TOLERANCE)
    torch.testing.assert_close(left + right, whole, rtol=0, atol=MASS_TOLERANCE)


def test_one_key_that_holds_nearly_everything_does_not_drown_the_rest(decode_case):
    """A BOS-like sink key: the small masses keep their relative precision."""
    case = decode_case
    n = int(case["seq_lens"][0])
    case["keys"][case["block_table"][0, 0], 0] = case["query"][0, ::3] * 3.0
    case["bounds"][:, 1] = torch.tensor([1, n])
    mass, _, _ = run(case, 1, scale=0.125)
    keys = reference.paged_keys(case["keys"], case["block_table"][0], n)
    expected = reference.attend(case["query"][0], keys, keys, scale=0.125).mass(1, n)
    assert (expected < 1e-3).any()
    torch.testing.assert_close(mass[4, 2, 1, :, 1].double(), expected, rtol=1e-4, atol=1e-12)


def test_a_poisoned_key_that_is_attended_shows(decode_case):
    position = int(decode_case["seq_lens"][0]) - 1
    page, offset = divmod(position, 32)
    decode_case["keys"][decode_case["block_table"][0, page], offset] = torch.nan
    entropy = torch.zeros(decode_case["mass"].shape[:4])
    mass, output, _ = run(decode_case, 1, scale=0.125, entropy=entropy)
    assert torch.isnan(mass[4, 2, 1]).all()
    assert torch.isnan(entropy[4, 2, 1]).all()
    assert torch.isnan(output[0]).all()


def test_entropy_of_keys_that_have_as_much_each_and_of_one_that_has_all(decode_case):
    """ln n of n equal keys, less by a sink's share: (1 - share) (ln n - ln(1 - share)); next to 0 of one key alone."""
    case, entropy, how = decode_case, torch.full(decode_case["mass"].shape[:4], torch.nan), {"scale": 0.125}
    case["keys"][:] = 0.0
    lengths = case["seq_lens"].double()
    of_rows = (case["row_slot"].long(), 2, 1)
    run(case, entropy=entropy, **how)
    torch.testing.assert_close(entropy[of_rows].double(), lengths.log()[:, None].expand(-1, 9), rtol=1e-6, atol=0)
    run(case, entropy=entropy, sinks=torch.full((9,), 3.0), **how)
    rest = lengths / (lengths + np.exp(3.0))
    expected = (rest * (lengths.log() - rest.log()))[:, None].expand(-1, 9)
    torch.testing.assert_close(entropy[of_rows].double(), expected, rtol=1e-6, atol=0)
    case["query"][:], case["keys"][case["block_table"][:, 0], 0] = 10.0, 10.0
    run(case, entropy=entropy, **how)
    assert (entropy[of_rows].abs() < 1e-30).all()


def test_a_query_cut_between_many_threads():
    """One long row on more threads than it has KV heads: every thread holds a part of it."""
    rng = np.random.default_rng(3)
    case = make_case(
        rng, batch=1, kv_heads=1, group=4, head_dim=64, page=32, regions=2, dtype=torch.float32, longest=700
    )
    case["row_slot"][:], case["n_rows"][:] = 0, 5
    case["seq_lens"][:], case["prompt_len"][:] = 690, 688
    case["query_start_loc"] = torch.tensor([0, 1], dtype=torch.int32)
    case["block_table"] = torch.arange(22, dtype=torch.int32)[None]
    shape = (22, 32, 1, 64)
    case["keys"], case["values"] = (torch.from_numpy(rng.standard_normal(shape, np.float32)) for _ in range(2))
    for threads in (1, 2, 5, 22, 40):
        assert_agrees(case, scale=0.125, threads=threads)


def test_strided_queries_and_outputs_of_neighbouring_tokens_are_left_alone(decode_case):
    """Queries as vLLM hands them over: rows of a wider tensor that holds keys and values too."""
    query = decode_case["query"]
    wide = torch.full((3, 15, 64), torch.nan)
    wide[:, 3:12] = query
    _, expected, _ = run(decode_case, scale=0.125)
    decode_case["query"] = wide[:, 3:12]
    assert decode_case["query"].stride() == (960, 64, 1)
    _, output, _ = run(decode_case, scale=0.125)
    assert torch.equal(output.contiguous(), expected)


@pytest.mark.parametrize(("page", "head_dim"), [(24, 64), (32, 40), (8, 64)])
def test_a_cache_that_the_tiles_do_not_divide_is_refused(page, head_dim):
    mass, bounds = torch.empty(1, 1, 1, 2, 1), torch.zeros(1, 1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"block size {page} and head size {head_dim}: both must be multiples of 16"):
        PagedAttention(mass, 0, torch.zeros(3, 1, page, 2 * head_dim), bounds, scale=1.0)


def test_a_buffer_for_entropies_of_another_shape_is_refused():
    mass, bounds = torch.empty(2, 4, 3, 2, 1), torch.zeros(2, 1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"entropy of shape \[2, 4, 3, 1\] beside mass of shape \[2, 4, 3, 2, 1\]"):
        PagedAttention(mass, 0, torch.zeros(3, 1, 32, 64), bounds, scale=1.0, entropy=torch.empty(2, 4, 3, 1))


def test_queries_of_a_batch_by_hand():
    starts, seq_lens = np.array([0, 1, 4, 5, 7], np.int32), np.array([12, 9, 5, 30], np.int32)
    slots, prompt_len, n_rows = (np.array(a, np.int32) for a in ([0, 1, -1, 2], [10, 8, 25], [5, 2, 9]))
    # Row 0 decodes at step 2; row 1 is a chunk of positions 6..8, steps -1, 0, 1; row 2 is not probed; row 3 is past
    # its recorded steps (4, 5 of 4).
    table = measured_queries(starts, seq_lens, slots, prompt_len, n_rows, 4, True)
    assert table.tolist() == [[0, 0, 0, 2, 12], [1, 2, 1, 0, 8], [1, 3, 1, 1, 9], [2, 4, -1, -1, 5]]
    assert measured_queries(starts, seq_lens, slots, prompt_len, n_rows, 4, False).tolist() == table[:3].tolist()
