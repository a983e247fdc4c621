"""The Triton kernels on hardware: the cases that tests/kernels/interpreted holds to the oracle in the interpreter."""

import numpy as np
import pytest
import torch

from headrift_kernels import reference
from headrift_kernels.cases import DecodeCase, decode_case, span_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

# As in the interpreter, but the dot products of 16-bit types are a tensor core's, and exponentials are approximate.
MASS_TOLERANCE = 2e-5
OUTPUT_TOLERANCE = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
ENTROPY_TOLERANCE = 1e-4
# of a score or LSE of size 30 in float32, and of exp2 and log2
LSE_TOLERANCE = 2e-5
TYPES = [
    (torch.float32, None),
    (torch.float16, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float16, torch.float8_e5m2),
]


def on_device(case):
    """The case with its tensors on the GPU."""
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in vars(case).items()}
    moved["how"] = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.how.items()}
    return type(case)(**moved)


def skip_unsupported(cache_dtype):
    if cache_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton reads e4m3 from compute capability 8.9 on")


def options(rng, heads, kind):
    return {
        "plain": {},
        "window": {"window": 70},
        "softcap": {"softcap": 5.0},
        "alibi": {"alibi_slopes": torch.linspace(0.01, 0.3, heads)},
        "sinks": {"sinks": torch.from_numpy(rng.standard_normal(heads).astype(np.float32))},
    }[kind]


def decode(case: DecodeCase, splits: int, with_mass: bool = True):
    from headrift_kernels.triton.decode_mass import SplitScratch, decode_mass

    device = on_device(case)
    rows, heads, head_dim = case.query.shape
    output, mass, entropy = torch.empty_like(device.query), device.empty_mass(), device.empty_entropy()
    scratch = None
    if splits > 1:
        scratch = SplitScratch.allocate(rows, heads, head_dim, case.bounds.shape[1], splits, "cuda")
    how = {k: torch.tensor([x], device="cuda") if k.endswith("_scale") else x for k, x in device.how.items()}
    decode_mass(output, mass if with_mass else None, 1, *device.batch, entropy=entropy, scratch=scratch, **how)
    torch.cuda.synchronize()
    return output.cpu(), mass.cpu(), entropy.cpu()


def assert_decode_agrees(case, splits):
    output, mass, entropy = decode(case, splits)
    expected = reference.decode_mass(case.empty_mass(), 1, *case.batch, **case.how)
    tolerance = OUTPUT_TOLERANCE[case.query.dtype] * max(1.0, case.how.get("v_scale", 1.0))
    torch.testing.assert_close(output.double(), expected.output, rtol=0, atol=tolerance)
    torch.testing.assert_close(mass.double(), expected.mass, rtol=0, atol=MASS_TOLERANCE, equal_nan=True)
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=0, atol=ENTROPY_TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_decode_agrees_with_the_oracle(head_dim, types, splits):
    dtype, cache_dtype = types
    skip_unsupported(cache_dtype)
    scales = {} if cache_dtype is None else {"k_scale": 0.5, "v_scale": 1.5}
    case = decode_case(
        np.random.default_rng(head_dim),
        seq_lens=[1, 700, 64, 333, 0],
        head_dim=head_dim,
        dtype=dtype,
        cache_dtype=cache_dtype,
        layout="joint",
        **scales,
    )
    assert_decode_agrees(case, splits)


@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "alibi", "sinks"])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16])
def test_decode_options_and_groups(group, kind):
    rng = np.random.default_rng(group)
    how = options(rng, 2 * group, kind)
    case = decode_case(
        rng, seq_lens=[150, 601], group=group, page=32, regions=8, dtype=torch.bfloat16, layout="hnd", **how
    )
    assert_decode_agrees(case, 1)
    assert_decode_agrees(case, 3)


@pytest.mark.parametrize("splits", [1, 32])
def test_a_context_of_128k(splits):
    case = decode_case(np.random.default_rng(0), seq_lens=[131_072, 17], kv_heads=1, dtype=torch.bfloat16, unprobed=0.0)
    case.n_rows[:] = 9
    assert_decode_agrees(case, splits)


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_that_are_not_probed_are_as_without_masses(splits):
    case = decode_case(np.random.default_rng(1), seq_lens=[500, 100], dtype=torch.bfloat16)
    case.row_slot[:] = -1
    plain, *_ = decode(case, splits, with_mass=False)
    probed, mass, _ = decode(case, splits)
    assert torch.equal(plain, probed)
    assert torch.isnan(mass).all()


@pytest.mark.parametrize("prompt_region", [None, 0])
@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "alibi", "sinks"])
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_lse_and_span_mass_agree_with_the_oracle(types, kind, prompt_region):
    from headrift_kernels.triton.query_lse import query_lse
    from headrift_kernels.triton.span_mass import span_mass

    dtype, cache_dtype = types
    skip_unsupported(cache_dtype)
    rng = np.random.default_rng(2)
    scale = {} if cache_dtype is None else {"k_scale": 0.5}
    case = span_case(
        rng, seq_lens=[300, 40, 7], steps=20, dtype=dtype, cache_dtype=cache_dtype, **scale, **options(rng, 6, kind)
    )
    if prompt_region is not None:
        case.bounds[:, 0, 0], case.bounds[:, 0, 1] = 0, case.prompt_len
    device = on_device(case)
    mass = device.empty_mass()
    k_scale = torch.tensor([case.k_scale], device="cuda") if cache_dtype is not None else None
    span_mass(mass, 1, *device.batch, prompt_region=prompt_region, k_scale=k_scale, **device.how)
    torch.testing.assert_close(mass.cpu().double(), case.expected(1), rtol=0, atol=MASS_TOLERANCE, equal_nan=True)
    device.lse, mass = torch.full_like(device.lse, torch.nan), device.empty_mass()
    query_lse(device.lse, *device.lse_batch, k_scale=k_scale, **device.how)
    lse = device.lse.cpu().double()
    torch.testing.assert_close(lse, case.expected_lse(), rtol=0, atol=LSE_TOLERANCE, equal_nan=True)
    span_mass(mass, 1, *device.batch, prompt_region=prompt_region, k_scale=k_scale, **device.how)
    tolerance = MASS_TOLERANCE + LSE_TOLERANCE
    torch.testing.assert_close(mass.cpu().double(), case.expected(1), rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_lse_of_a_chunk_that_ends_a_long_prompt(head_dim, types):
    from headrift_kernels.triton.query_lse import query_lse

    dtype, cache_dtype = types
    skip_unsupported(cache_dtype)
    scale = {} if cache_dtype is None else {"k_scale": 0.5}
    case = span_case(
        np.random.default_rng(head_dim),
        seq_lens=[3000, 700],
        query_lens=[64, 700],
        head_dim=head_dim,
        dtype=dtype,
        cache_dtype=cache_dtype,
        layout="joint",
        unprobed=0.0,
        **scale,
    )
    case.prompt_len[case.row_slot.long()], case.n_rows[:] = case.seq_lens, 5
    device = on_device(case)
    k_scale = torch.tensor([case.k_scale], device="cuda") if cache_dtype is not None else None
    lse = torch.full_like(device.lse, torch.nan)
    query_lse(lse, *device.lse_batch, k_scale=k_scale, **device.how)
    torch.testing.assert_close(lse.cpu().double(), case.expected_lse(), rtol=0, atol=LSE_TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [2, 2049, 151_936])
def test_logit_statistics_agree_with_the_oracle(vocab, dtype):
    from headrift_kernels.triton.logit_stats import logit_statistics

    logits = (5 * torch.randn(3, vocab, generator=torch.Generator().manual_seed(0))).to(dtype)
    stats = torch.full((3, 2, 3), torch.nan, device="cuda")
    integers = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([2, -1, 0], [1, 0, 1], [2, 2, 2])]
    logit_statistics(stats, logits.cuda(), *integers)
    expected = reference.logit_statistics(logits)
    torch.testing.assert_close(stats[[2, 0], 1].cpu().double(), expected[[0, 2]], rtol=5e-5, atol=2e-5)
    assert torch.isnan(stats[:, 0]).all()
    assert torch.isnan(stats[1]).all()


def test_a_cuda_graph_replays_the_lse_and_masses_of_new_positions():
    """The grid is of what the host knows: a captured call follows the rows that are measured as they change."""
    from headrift_kernels.triton.query_lse import query_lse
    from headrift_kernels.triton.span_mass import span_mass

    case = span_case(np.random.default_rng(6), seq_lens=[120, 203], query_lens=[40, 60], unprobed=0.0, poison=False)
    case.n_rows[:] = 5
    device = on_device(case)
    mass = device.empty_mass()

    def call():
        query_lse(device.lse, *device.lse_batch, max_query_len=60, **device.how)
        span_mass(mass, 1, *device.batch, max_query_len=60, **device.how)

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    case.seq_lens -= 1
    case.row_slot[:] = case.row_slot.flip(0).clone()
    case.prompt_len[case.row_slot.long()] = case.seq_lens - 2
    for name in ("seq_lens", "row_slot", "prompt_len"):
        getattr(device, name).copy_(getattr(case, name))
    for buffer in (mass, device.lse):
        buffer.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    tolerance = MASS_TOLERANCE + LSE_TOLERANCE
    torch.testing.assert_close(mass.cpu().double(), case.expected(1), rtol=0, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(
        device.lse.cpu().double(), case.expected_lse(), rtol=0, atol=LSE_TOLERANCE, equal_nan=True
    )


def test_a_cuda_graph_replays_the_masses_of_new_positions():
    """Nothing is read on the host: a captured call follows seq_lens, slots and bounds as they change."""
    from headrift_kernels.triton.decode_mass import decode_mass

    case = decode_case(np.random.default_rng(4), seq_lens=[100, 203], dtype=torch.bfloat16, unprobed=0.0, poison=False)
    case.n_rows[:] = 5
    device = on_device(case)
    output, mass = torch.empty_like(device.query), device.empty_mass()

    def call():
        decode_mass(output, mass, 1, *device.batch, **device.how)

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    case.seq_lens -= 1
    case.row_slot[:] = case.row_slot.flip(0).clone()
    case.prompt_len[case.row_slot.long()] = case.seq_lens - 2
    case.bounds[:, 0] = torch.tensor([3, 60])
    for name in ("seq_lens", "row_slot", "prompt_len", "bounds"):
        getattr(device, name).copy_(getattr(case, name))
    mass.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    expected = reference.decode_mass(case.empty_mass(), 1, *case.batch, **case.how)
    torch.testing.assert_close(mass.cpu().double(), expected.mass, rtol=0, atol=MASS_TOLERANCE, equal_nan=True)
    torch.testing.assert_close(output.cpu().double(), expected.output, rtol=0, atol=4e-2)
