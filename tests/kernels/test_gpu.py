"""The Triton kernels on hardware: the cases that tests/kernels/interpreted holds to the oracle in the interpreter.

Few and large, since each combination of options is a compilation of a second or more.
"""

import numpy as np
import pytest
import torch

from headrift_kernels import reference
from tools.cases import DecodeCase, decode_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

# As in the interpreter, but the dot products of 16-bit types are a tensor core's, and exponentials are approximate.
MASS_TOLERANCE = 2e-5
OUTPUT_TOLERANCE = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
ENTROPY_TOLERANCE = 1e-4


def on_device(case):
    """The case with its tensors on the GPU."""
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in vars(case).items()}
    moved["how"] = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.how.items()}
    return type(case)(**moved)


def options(rng, heads, kind):
    return {
        "plain": {},
        "window": {"window": 600},
        "softcap": {"softcap": 5.0},
        "alibi": {"alibi_slopes": torch.linspace(0.001, 0.1, heads)},
        "sinks": {"sinks": torch.from_numpy(rng.standard_normal(heads).astype(np.float32))},
    }[kind]


def on_gpu(how, *without):
    """Options as the kernels take them: scales are tensors of one number."""
    moved = {k: torch.tensor([x], device="cuda") if k.endswith("_scale") else x for k, x in how.items()}
    return {k: x for k, x in moved.items() if k not in without}


def call_decode(device: DecodeCase, output, mass, entropy, splits):
    from headrift_kernels.triton.decode_mass import SplitScratch, decode_mass

    rows, (heads, head_dim), regions = len(device.seq_lens), device.query.shape[1:], device.bounds.shape[1]
    scratch = SplitScratch.allocate(rows, heads, head_dim, regions, splits, "cuda") if splits > 1 else None
    batch = {"query_start_loc": device.query_start_loc, "entropy": entropy, "scratch": scratch}
    decode_mass(output, mass, 1, *device.batch, **batch, **on_gpu(device.how))


def call_replay(device: DecodeCase, mass, entropy, splits, most_queries):
    from headrift_kernels.triton.replay_mass import ReplayScratch, replay_mass

    rows, heads, regions = len(device.seq_lens), device.query.shape[1], device.bounds.shape[1]
    scratch = ReplayScratch.allocate(rows, most_queries, heads, regions, splits, "cuda") if splits > 1 else None
    batch = {"most_queries": most_queries, "entropy": entropy, "scratch": scratch}
    replay_mass(mass, 1, *device.replay_batch, **batch, **on_gpu(device.how, "v_scale"))


def decode(case: DecodeCase, splits: int, with_mass: bool = True):
    device = on_device(case)
    output = torch.full_like(device.query, torch.nan)
    mass, entropy = device.empty_mass(), device.empty_entropy()
    call_decode(device, output, mass if with_mass else None, entropy, splits)
    torch.cuda.synchronize()
    return output.cpu(), mass.cpu(), entropy.cpu()


def assert_recorded(mass, entropy, expected):
    torch.testing.assert_close(mass.cpu().double(), expected.mass, rtol=0, atol=MASS_TOLERANCE, equal_nan=True)
    torch.testing.assert_close(entropy.cpu().double(), expected.entropy, rtol=0, atol=ENTROPY_TOLERANCE, equal_nan=True)


def expected_decode(case):
    start = case.query_start_loc
    return reference.decode_mass(case.empty_mass(), 1, *case.batch, query_start_loc=start, **case.how)


def expected_replay(case):
    how = {k: x for k, x in case.how.items() if k != "v_scale"}
    return reference.replay_mass(case.empty_mass(), 1, *case.replay_batch, **how)


def assert_decode_agrees(case, splits):
    output, mass, entropy = decode(case, splits)
    expected = expected_decode(case)
    tolerance = OUTPUT_TOLERANCE[case.query.dtype] * max(1.0, case.how.get("v_scale", 1.0))
    torch.testing.assert_close(output.double(), expected.output, rtol=0, atol=tolerance, equal_nan=True)
    assert_recorded(mass, entropy, expected)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize(
    ("head_dim", "group", "dtype", "cache_dtype", "kind", "splits"),
    [
        (64, 3, BF16, None, "plain", 8),
        (128, 4, BF16, None, "plain", 1),
        (128, 7, FP16, None, "window", 8),
        (80, 1, FP32, None, "softcap", 8),
        (96, 16, BF16, None, "alibi", 1),
        (256, 2, BF16, None, "sinks", 8),
        (128, 8, BF16, E4M3, "sinks", 8),
        (64, 5, FP16, E5M2, "window", 1),
    ],
    ids=str,
)
def test_a_mixed_batch_agrees_with_the_oracle(head_dim, group, dtype, cache_dtype, kind, splits):
    """Decode rows of 1 to 8,200 keys, a replay, a chunk that ends a prompt and one that does not, and padding."""
    if cache_dtype == E4M3 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton reads e4m3 from compute capability 8.9 on")
    rng = np.random.default_rng(head_dim)
    scales = {} if cache_dtype is None else {"k_scale": 0.5, "v_scale": 1.5}
    case = decode_case(
        rng,
        seq_lens=[1, 8200, 64, 700, 1300, 600, 300, 0],
        query_lens=[1, 1, 1, 1, 1300, 40, 64, 0],
        steps=20,
        group=group,
        head_dim=head_dim,
        dtype=dtype,
        cache_dtype=cache_dtype,
        layout="joint",
        unprobed=0.0,
        **scales,
        **options(rng, 2 * group, kind),
    )
    slot = case.row_slot.long()
    case.prompt_len[slot[4:7]] = torch.tensor([1285, 600, 400], dtype=torch.int32)
    case.n_rows[slot[:6]] = 20
    case.row_slot[2] = -1
    assert_decode_agrees(case, splits)
    device = on_device(case)
    mass, entropy = device.empty_mass(), device.empty_entropy()
    call_replay(device, mass, entropy, splits, 20)
    expected = expected_replay(case)
    assert torch.isfinite(expected.mass[slot[4], :15, 1]).all()
    assert_recorded(mass, entropy, expected)


@pytest.mark.parametrize(("dtype", "splits"), [(FP32, 1), (BF16, 4)])
def test_decode_rows_alone_agree_with_the_oracle(dtype, splits):
    """One query a row, without query_start_loc; a row of no keys gives zeros."""
    case = decode_case(
        np.random.default_rng(3), seq_lens=[1, 2050, 64, 333, 0], page=32, regions=8, dtype=dtype, layout="hnd"
    )
    assert_decode_agrees(case, splits)


def test_a_context_of_128k():
    case = decode_case(np.random.default_rng(0), seq_lens=[131_072, 17], kv_heads=1, dtype=BF16, unprobed=0.0)
    case.n_rows[:] = 9
    assert_decode_agrees(case, 32)


def test_rows_that_are_not_probed_are_as_without_masses():
    case = decode_case(np.random.default_rng(1), seq_lens=[1500, 100], dtype=BF16)
    case.row_slot[:] = -1
    plain, *_ = decode(case, 4, with_mass=False)
    probed, mass, _ = decode(case, 4)
    # two compilations, whose sums may be rounded in another order: one last place of bfloat16 at |output| up to 4
    torch.testing.assert_close(plain, probed, rtol=0, atol=2**-6)
    assert torch.isnan(mass).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("vocab", [2, 151_936])
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


def test_a_cuda_graph_replays_the_masses_of_new_positions():
    """Nothing is read on the host: captured calls follow lengths, slots, positions and bounds as they change."""
    lens = {"seq_lens": [700, 203, 120], "query_lens": [1, 60, 1]}
    case = decode_case(np.random.default_rng(6), **lens, dtype=BF16, unprobed=0.0, poison=False)
    case.n_rows[:] = 5
    device = on_device(case)
    output, mass, entropy = torch.empty_like(device.query), device.empty_mass(), device.empty_entropy()

    def call():
        call_decode(device, output, mass, entropy, 2)
        call_replay(device, mass, entropy, 2, 5)

    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    case.seq_lens -= 1
    case.row_slot[:] = case.row_slot.flip(0).clone()
    case.prompt_len[case.row_slot.long()] = case.seq_lens - 3
    case.bounds[:, 0] = torch.tensor([3, 60])
    for name in ("seq_lens", "row_slot", "prompt_len", "bounds"):
        getattr(device, name).copy_(getattr(case, name))
    for buffer in (output, mass, entropy):
        buffer.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    decoded, replayed = expected_decode(case), expected_replay(case)
    both = reference.Recorded(
        torch.where(decoded.mass.isnan(), replayed.mass, decoded.mass),
        torch.where(decoded.entropy.isnan(), replayed.entropy, decoded.entropy),
    )
    assert torch.isfinite(both.mass[case.row_slot[1], :4, 1]).all()
    assert_recorded(mass, entropy, both)
    torch.testing.assert_close(
        output.cpu().double(), decoded.output, rtol=0, atol=OUTPUT_TOLERANCE[BF16], equal_nan=True
    )
