"""The engine on a GPU, with CUDA graphs, against transformers' eager attention on the same token ids.

HEADRIFT_GPU_DRY_RUN=1 runs these tests with vLLM's CPU build instead, in float32 and without graphs: then nothing in
this file is new on the day when there is a GPU. Run them by `make gpu-check`; several at once are fine, but for the one
that lets vLLM profile the GPU's memory, which processes beside it disturb.
"""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from headrift.errors import RefusedError
from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest

DRY_RUN = os.environ.get("HEADRIFT_GPU_DRY_RUN") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not DRY_RUN and not torch.cuda.is_available(), reason="no GPU"),
]
# Two float32 computations differ by some 1e-5 (see Agreement); cuBLAS and Triton sum in yet another order.
FLOAT32_TOLERANCE = 1e-4
# A 16-bit engine may be off by what transformers is off by in that type. A float32 computation that rounds the output
# of every module to float16 or bfloat16 (and keys and values to fp8) has 0.6 to 0.9 of transformers' mean error, and
# 0.4 to 1.0 of its largest; a mistaken head is off by 10 to 400 times as much.
MEAN_FACTOR, MAX_FACTOR = 2.0, 3.0
CASES = [
    ("triton", "llama-3to1", torch.float32),
    ("triton", "gemma3", torch.float32),
    ("flash", "llama-3to1", torch.float16),
    ("auto", "llama-3to1", torch.bfloat16),
    ("auto", "gemma3", torch.bfloat16),
]
REGIONS = ("system", "user", "prompt")
SPANS = {"system": (2, 14), "user": (15, 24)}
# All decode steps as one captured graph each, and no torch.compile, which takes most of a start.
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


@pytest.fixture
def start(monkeypatch):
    """Start an engine with prompts in chunks of 64 tokens and a prefix cache.

    Args:
        folder: The model's.
        backend, dtype: Of attention and of the model. In a dry run those that a CPU can have.
        compiled: Whether torch compiles the model, as by default; otherwise there are graphs for decoding only.
        variables: Environment of the engine.
        options: Of ProbedEngine.
        settings: Of vLLM.
    """

    def start(folder, backend="auto", dtype=torch.bfloat16, *, compiled=False, variables=(), options=(), **settings):
        import vllm.envs

        # vLLM's own Triton kernel multiplies float32 in tf32 by Triton's default.
        for name, value in {"TRITON_F32_DEFAULT": "ieee", **dict(variables)}.items():
            monkeypatch.setenv(name, value)
        vllm.envs.disable_envs_cache()  # an earlier engine of this process has had vLLM keep its environment
        defaults = {
            "dtype": "float32" if DRY_RUN else str(dtype).removeprefix("torch."),
            "max_num_batched_tokens": 64,
            "enable_prefix_caching": True,
            "skip_tokenizer_init": True,
            "max_num_seqs": 8,
            "max_model_len": 256,
            "kv_cache_memory_bytes": 64 << 20,
            "gpu_memory_utilization": 0.05,  # so much must be free at the start: several engines share the GPU
        }
        if not (DRY_RUN or compiled):
            defaults["compilation_config"] = GRAPHS
        options = {"steps": 8, "slots": 12, "attention_backend": "auto" if DRY_RUN else backend, **dict(options)}
        engine = ProbedEngine(folder, **options, engine_args={**defaults, **settings})
        assert DRY_RUN or engine.llm_engine.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        return engine

    return start


@pytest.fixture(scope="session")
def rounded(tiny_model, tmp_path_factory):
    """The folder of a tiny model with its weights rounded to a type, and that type, by name and type."""
    import transformers

    models: dict[tuple[str, torch.dtype], SimpleNamespace] = {}

    def model(name, dtype):
        if (name, dtype) not in models:
            folder = tmp_path_factory.mktemp(name)
            load = transformers.AutoModelForCausalLM.from_pretrained
            load(tiny_model(name), dtype=dtype).save_pretrained(folder)
            models[name, dtype] = SimpleNamespace(folder=folder, dtype=dtype)
        return models[name, dtype]

    return model


@pytest.fixture(scope="session")
def assert_close(oracle):
    """Hold the masses of every probed request to the oracle of a rounded model; the number of steps compared."""
    peers = {}

    def compare(model, items):
        exact = oracle(model.folder)
        if model.dtype != torch.float32 and model.folder not in peers:
            peers[model.folder] = type(exact)(model.folder)
            peers[model.folder].model.to(model.dtype)
        steps, errors, peer_errors, swapped = 0, [], [], []
        for item in items:
            request, n = item.done.request, item.done.n_steps
            if not request.probed:
                assert item.recording is None
                continue
            assert item.recording.mass.shape[0] == n + 1
            assert np.isfinite(item.recording.mass).all()
            spans = [{**request.regions, "prompt": (0, len(request.prompt_ids))}[name] for name in REGIONS]
            expected = exact.masses(request.prompt_ids, item.done.answer_ids, n, spans)
            steps += n + 1
            if model.dtype == torch.float32:
                np.testing.assert_allclose(item.recording.mass, expected, rtol=0, atol=FLOAT32_TOLERANCE)
                continue
            of_peer = peers[model.folder].masses(request.prompt_ids, item.done.answer_ids, n, spans)
            errors.append(np.abs(item.recording.mass - expected).ravel())
            peer_errors.append(np.abs(of_peer - expected).ravel())
            swapped.append(np.abs(np.roll(expected, 1, axis=2) - expected).ravel())
        if errors:
            ours, theirs, of_another_head = map(np.concatenate, (errors, peer_errors, swapped))
            assert ours.mean() <= MEAN_FACTOR * theirs.mean()
            assert ours.max() <= MAX_FACTOR * theirs.max()
            assert of_another_head.mean() > 2 * MEAN_FACTOR * theirs.mean(), "a weak test: swapped heads would pass"
        return steps

    return compare


def replays_of(items):
    """The probed requests again, with the answers that they had."""
    again = (item.done for item in items if item.done.request.probed)
    return [replace(done.request, answer_ids=done.answer_ids, skip_prefix_cache=True) for done in again]


@pytest.mark.parametrize(("backend", "name", "dtype"), CASES, ids=str)
def test_masses(backend, name, dtype, rounded, start, random_requests, run, assert_close):
    """In mixed, chunked and cached batches, and replayed; compiled as by default, with both kinds of graph."""
    model = rounded(name, dtype)
    with start(model.folder, backend, dtype, compiled=True) as engine:
        assert DRY_RUN or engine.llm_engine.vllm_config.use_v2_model_runner
        requests = random_requests(1, 24, ignore_eos=True)
        items = run(engine, requests) + run(engine, requests[:6:3] * 2, at_once=1)
        replayed = run(engine, replays_of(items[:12]))
    assert any(item.done.cached_tokens for item in items), "no prompt found its prefix cached"
    assert assert_close(model, items) > 50
    assert assert_close(model, replayed) > 20


def test_model_runner_v1_or_its_refusal(rounded, start, random_requests, run, assert_close):
    model = rounded("llama-3to1", torch.bfloat16)
    try:
        engine = start(model.folder, variables={"VLLM_USE_V2_MODEL_RUNNER": "0"})
    except RefusedError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert "model runner" in refusal
        return
    with engine:
        assert not engine.llm_engine.vllm_config.use_v2_model_runner
        items = run(engine, random_requests(2, 16, ignore_eos=True))
    assert assert_close(model, items) > 30


def test_preempted_requests_resume(rounded, start, run, preemptions, assert_close):
    model = rounded("llama-3to1", torch.bfloat16)
    # Preemptions are counted in this process. Prompts end just before a block does: all want another at once.
    in_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with start(model.folder, variables=in_process, block_size=32, num_gpu_blocks_override=20) as engine:
        rng = np.random.default_rng(5)
        prompts = [rng.integers(3, 200, 90 + i // 2).tolist() for i in range(12)]
        requests = [ProbeRequest(ids, SPANS, 8, ignore_eos=True, probed=i % 2 == 0) for i, ids in enumerate(prompts)]
        items = run(engine, requests)
    assert preemptions, "no request was preempted: the cache is too large for this test to mean anything"
    assert assert_close(model, items) == 6 * 9


@pytest.mark.skipif(DRY_RUN, reason="an fp8 KV cache needs a GPU")
def test_an_fp8_kv_cache(rounded, start, random_requests, run, assert_close, monkeypatch):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton reads e4m3 from compute capability 8.9 on")
    model = rounded("llama-3to1", torch.bfloat16)
    with start(model.folder, "triton", kv_cache_dtype="fp8") as engine:
        items = run(engine, random_requests(3, 16, ignore_eos=True))
    round_kv_to_fp8(monkeypatch)
    assert assert_close(model, items) > 30


def test_the_oracle_of_an_fp8_cache_rounds(rounded, oracle, monkeypatch):
    """What the test above is held to moves by more than 16-bit rounding when keys are rounded to 3 bits."""
    model, ids = rounded("llama-3to1", torch.bfloat16), list(range(3, 63))
    before = oracle(model.folder).run(ids, -1).attentions
    round_kv_to_fp8(monkeypatch)
    assert np.abs(oracle(model.folder).run(ids, -1).attentions[:, 0] - before[:, 0]).max() > 1e-3


def round_kv_to_fp8(monkeypatch):
    """Have transformers round keys and values as an e4m3 cache with a scale of 1 does."""
    from transformers.models.llama import modeling_llama

    eager = modeling_llama.eager_attention_forward

    def from_fp8(module, query, key, value, *args, **kwargs):
        key, value = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (key, value))
        return eager(module, query, key, value, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", from_fp8)


def test_attention_sinks(rounded, start, random_requests, run, assert_close, monkeypatch):
    modeling = pytest.importorskip("transformers.models.granite_swa.modeling_granite_swa")

    def eager(module, query, key, value, attention_mask, scaling, **kwargs):
        """Attention with the sink as one more logit, whose weights are those of the keys."""
        key, value = (modeling.repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling + attention_mask
        sinks = module.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
        return (weights @ value).transpose(1, 2), weights

    monkeypatch.setattr(modeling, "eager_attention_forward", eager)
    model = rounded("granite-sinks", torch.float32)
    with start(model.folder, "triton", torch.float32) as engine:
        assert engine.sinks
        items = run(engine, random_requests(4, 16, ignore_eos=True))
    assert assert_close(model, items) > 30
    of_prompts = np.concatenate([item.recording.mass[0, ..., 2].ravel() for item in items if item.recording])
    assert of_prompts.min() < 0.9, "the sinks take next to nothing: a weak test"


def test_ablated_heads_beside_a_clean_row(rounded, start, run, oracle, assert_close):
    model = rounded("llama-3to1", torch.float32)
    rows = [
        (),
        [(0, 1, "undifferentiated")],
        [(0, 0, "scaling"), (1, 2, "mean_query"), (1, 3, "undifferentiated")],
        [(1, 1, "mean_output"), (0, 3, "mean_query")],
    ]
    ids = np.random.default_rng(6).integers(3, 200, 40).tolist()
    requests = [ProbeRequest(ids, SPANS, 4, ignore_eos=True, ablate=row, epsilon=0.01) for row in rows]
    with start(model.folder, "triton", torch.float32, options={"ablation": True}) as engine:
        items = run(engine, requests)
    clean = items[0].recording.mass
    for item, row in zip(items, rows, strict=True):
        with oracle(model.folder).ablated(row, 0.01):
            assert assert_close(model, [item]) == 5
        # The layer behind an ablated head sees other inputs.
        assert not row or np.abs(item.recording.mass[0, -1] - clean[0, -1]).max() > 10 * FLOAT32_TOLERANCE


def test_masses_after_memory_profiling(rounded, start, random_requests, run, assert_close):
    """Without kv_cache_memory_bytes vLLM sizes the KV cache itself: it runs the model, builds a first KV cache with its
    metadata builders, captures graphs on it, and throws all of that away before the real one is made."""
    model = rounded("llama-3to1", torch.bfloat16)
    share = 0.15 if DRY_RUN else 0.3
    with start(model.folder, kv_cache_memory_bytes=None, gpu_memory_utilization=share) as engine:
        items = run(engine, random_requests(5, 16, ignore_eos=True))
    assert assert_close(model, items) > 30
