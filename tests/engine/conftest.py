"""Engines, tiny models and the oracle for the engine tests. Starting vLLM takes seconds: fixtures share."""

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.tiny_models import VOCAB, make_tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny model by name, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny_model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


class Oracle:
    """transformers with eager attention: the probabilities and logits that every number is held to."""

    def __init__(self, folder: Path):
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.no_grad()
    def run(self, token_ids: list[int], first: int) -> SimpleNamespace:
        """attentions [queries, layers, heads, keys] and logits [queries, vocab] of queries first, first + 1, ..."""
        out = self.model(torch.tensor([token_ids]), output_attentions=True)
        attentions = torch.stack([a[0, :, first:] for a in out.attentions], 0).permute(2, 0, 1, 3)
        return SimpleNamespace(attentions=attentions.double().numpy(), logits=out.logits[0, first:])

    @torch.no_grad()
    def last_hidden(self, token_ids: list[int]) -> torch.Tensor:
        """The last token's hidden state after the final norm, [width] float64."""
        states = self.model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
        return states[-1][0, -1].double()

    def masses(self, prompt_ids: list[int], answer_ids: list[int], n_steps: int, spans) -> np.ndarray:
        """[n_steps + 1, layers, heads, regions] for the prompt with this answer."""
        fed = [*prompt_ids, *answer_ids[:n_steps]]
        attentions = self.run(fed, len(prompt_ids) - 1).attentions
        return np.stack([attentions[..., start:end].sum(-1) for start, end in spans], -1)

    def row_distances(self, other, own, runs) -> np.ndarray:
        """[steps, layers, heads, 2] L2 and total variation of a request's attention rows from another's, key by key.

        other, own: prompt and the answer tokens that were fed, as many; runs: as ProbeRequest.aligned.
        """
        (other_ids, other_fed), (own_ids, own_fed) = other, own
        theirs = self.run([*other_ids, *other_fed], len(other_ids) - 1).attentions
        ours = self.run([*own_ids, *own_fed], len(own_ids) - 1).attentions
        partner = {j + i: k + i for k, j, length in runs for i in range(length)}
        partner |= {len(own_ids) + i: len(other_ids) + i for i in range(len(own_fed))}
        target = np.zeros_like(ours)
        for own_key, other_key in partner.items():
            target[..., own_key] = theirs[..., other_key]
        return np.stack([np.sqrt(((ours - target) ** 2).sum(-1)), np.abs(ours - target).sum(-1) / 2], -1)

    @contextmanager
    def ablated(self, entries, epsilon: float = 1e-5):
        """The model with (layer, head, kind) ablated, by hooks on transformers' own modules.

        The query is changed before its rotary embedding (behind its norm, where there is one), which turns every head
        of a position alike: a factor and a mean over heads come out the same behind it.
        """
        handles = []
        for layer, decoder in enumerate(self.model.model.layers):
            attention = decoder.self_attn
            own = [(head, kind) for at, head, kind in entries if at == layer]
            query = attention.q_norm if hasattr(attention, "q_norm") else attention.q_proj
            # Gemma-3's norm sees [batch, heads, tokens, dim]; Qwen3's [batch, tokens, heads, dim].
            heads_first = type(attention).__name__ == "Gemma3Attention"

            def change(values, side, own=own, heads_first=heads_first):
                rows = values.transpose(1, 2) if heads_first and side == "query" else values
                split = rows.reshape(*rows.shape[:2], self.model.config.num_attention_heads, -1)
                changed = split.clone()
                for head, kind in own:
                    if kind == {"query": "undifferentiated", "output": "scaling"}[side]:
                        changed[:, :, head] = split[:, :, head] * epsilon
                    elif kind == f"mean_{side}":
                        changed[:, :, head] = split.mean(2)
                changed = changed.reshape(rows.shape)
                return changed.transpose(1, 2) if heads_first and side == "query" else changed

            handles.append(query.register_forward_hook(lambda m, a, out, change=change: change(out, "query")))
            handles.append(
                attention.o_proj.register_forward_pre_hook(lambda m, args, change=change: (change(args[0], "output"),))
            )
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture(scope="session")
def oracle(tiny_model, request):
    """The oracle of a model by name ("demo" for the demonstration model) or folder, loaded once."""
    loaded: dict[str | Path, Oracle] = {}

    def load(name: str | Path) -> Oracle:
        if name not in loaded:
            if name == "demo":  # only here: tests of other models run without the demonstration model
                folder = request.getfixturevalue("demo_model")
            else:
                folder = name if isinstance(name, Path) else tiny_model(name)
            loaded[name] = Oracle(folder)
        return loaded[name]

    return load


class Agreement:
    """Holds recordings to the oracle."""

    # Two float32 computations of the same model: matrix products in another order move q and k by some 1e-6 relative,
    # which a softmax over scores of up to about 30 turns into some 1e-5 of a probability.
    tolerance = 2e-5
    # A share divides by the prompt's mass; it is held to the same band where that mass is above 1e-2.
    least_prompt_mass = 1e-2

    def __call__(self, oracle: Oracle, run: list[SimpleNamespace]) -> int:
        """Hold every probed request to the oracle; the number of steps compared."""
        steps = 0
        for item in run:
            request, recording, n = item.done.request, item.recording, item.done.n_steps
            if not request.probed:
                assert recording is None
                continue
            assert recording.missing_steps == []
            assert recording.mass.shape[0] == n + 1
            spans = [request.regions[name] for name in ("system", "user", "prompt")]
            expected = oracle.masses(request.prompt_ids, item.done.answer_ids, n, spans)
            np.testing.assert_allclose(recording.mass, expected, rtol=0, atol=self.tolerance)
            np.testing.assert_array_equal(recording.first, recording.mass[0, ..., :2])  # the prompt's is the last
            whole = expected[..., 2]
            share = np.divide(expected[..., 0], whole, out=np.zeros_like(whole), where=whole > 1e-9)
            clear = whole > self.least_prompt_mass
            np.testing.assert_allclose(recording.share[clear], share[clear], rtol=0, atol=self.tolerance)
            steps += n + 1
        return steps


@pytest.fixture(scope="session")
def assert_agrees() -> Agreement:
    return Agreement()


def run_all(engine, requests, *, at_once: int | None = None, reruns: bool = False) -> list[SimpleNamespace]:
    """Every request's Finished and Recording (masses included, None where not probed), in the order given.

    Args:
        reruns: whether `engine.run` may have run requests again because steps were missing.
    """
    requests = list(requests)
    results = engine.run(enumerate(requests), want_mass=True, at_once=at_once)
    result = {i: SimpleNamespace(done=done, recording=recording) for i, done, recording in results}
    if not reruns:
        again = [i for i, item in result.items() if item.done.request is not requests[i]]
        assert not again, f"requests {again} lost steps and ran again"
    return [result[i] for i in range(len(result))]


@pytest.fixture(scope="session")
def run():
    return run_all


@pytest.fixture(scope="session")
def run_once():
    """One request's Finished and Recording as they come, also if steps are missing (`engine.run` runs it again)."""

    def run(engine, request) -> SimpleNamespace:
        engine.submit(request)
        finished = []
        while not finished:
            finished = engine.step()
        return SimpleNamespace(done=finished[0], recording=engine.drain(finished)[0])

    return run


@pytest.fixture(scope="session")
def random_requests():
    """Requests with prompts of many lengths, some sharing a prefix, each with its own regions and steps."""
    from headrift.requests import ProbeRequest

    def make(
        seed: int, n: int, *, vocab: int = VOCAB, steps: int = 8, shortest=3, longest=150, unprobed=0.25, **options
    ):
        rng = np.random.default_rng(seed)
        prefixes = [rng.integers(3, vocab, 70).tolist() for _ in range(2)]
        out = []
        for i in range(n):
            length = int(rng.integers(shortest, longest))
            ids = rng.integers(3, vocab, length).tolist()
            if i % 3 == 0:
                ids = prefixes[i % 2] + ids
            a, b, c, d = np.sort(rng.integers(0, len(ids) + 1, 4)).tolist()
            regions = {"system": (a, b), "user": (c, d), "prompt": (0, len(ids))}
            out.append(
                ProbeRequest(
                    ids,
                    regions,
                    steps=int(rng.integers(0, steps + 1)),
                    probed=bool(rng.random() >= unprobed),
                    **options,
                )
            )
        return out

    return make


def profile_graph_memory(runner) -> None:
    """What a CUDA worker does before it sizes the KV cache: make cache and metadata builders, and throw them away.

    vLLM's `profile_cudagraph_memory` of either model runner, without the graphs. `kv_cache_memory_bytes` skips that on
    a GPU; on a CPU nothing does it.
    """
    from vllm.config import set_current_vllm_config
    from vllm.v1.worker.gpu import cudagraph_utils

    v2 = hasattr(runner, "model_state")
    kind, compilation = type(runner), runner.compilation_config
    begin = cudagraph_utils._init_minimal_kv_cache_for_profiling if v2 else kind._init_minimal_kv_cache_for_profiling
    end = cudagraph_utils._teardown_profiling_state if v2 else kind._cleanup_profiling_kv_cache
    size, compilation.max_cudagraph_capture_size = compilation.max_cudagraph_capture_size, 4
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(runner.vllm_config):
        for name in ("synchronize", "empty_cache"):
            patch.setattr(torch.accelerator, name, lambda *_: None)
        begin(runner)
        end(runner)
    compilation.max_cudagraph_capture_size = size


@pytest.fixture(scope="session", autouse=True)
def _graph_memory_is_profiled():
    """Every engine of these tests starts as on a GPU: its first KV cache and metadata builders are thrown away."""
    if torch.cuda.is_available():  # vLLM does it by itself
        yield
        return
    from vllm.v1.worker.cpu_worker import CPUWorker

    size_of_cache = CPUWorker.determine_available_memory

    def after_profiling(self):
        size = size_of_cache(self)
        profile_graph_memory(self.model_runner)
        return size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUWorker, "determine_available_memory", after_profiling)
        yield


@pytest.fixture(scope="session")
def settings_of_tests() -> Mapping[str, object]:
    """Engine settings that make every hard case happen: 64-token chunks, small blocks, prefix caching."""
    return {
        "dtype": "float32",
        "max_num_batched_tokens": 64,
        "block_size": 32,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": 64 << 20,
    }


@pytest.fixture
def preemptions(monkeypatch) -> list[str]:
    """The ids of requests that vLLM's scheduler preempted during the test."""
    from vllm.v1.core.sched.scheduler import Scheduler

    seen: list[str] = []
    preempt = Scheduler._preempt_request

    def spy(self, request, *args, **kwargs):
        seen.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", spy)
    return seen


@pytest.fixture
def scheduled(monkeypatch) -> Counter:
    """Tokens that vLLM's scheduler had computed during the test, by request id."""
    from vllm.v1.core.sched.scheduler import Scheduler

    seen: Counter = Counter()
    schedule = Scheduler.schedule

    def spy(self, *args, **kwargs):
        output = schedule(self, *args, **kwargs)
        for name, tokens in output.num_scheduled_tokens.items():
            seen[int(name.split("-")[0])] += tokens
        return output

    monkeypatch.setattr(Scheduler, "schedule", spy)
    return seen


@pytest.fixture(scope="session")
def chatty(make_chat_model) -> Path:
    """Two random layers, with sharp attention, with the demonstration model's tokenizer and chat template."""
    return make_chat_model(initializer_range=0.15)


@pytest.fixture(scope="module")
def scorer(demo_model, settings_of_tests):
    """The demonstration model's scorer, shared by the tests of a module; `scorer.engine` takes raw requests."""
    from headrift import Scorer

    # With vLLM's own norms, so that what is not probed can be held to plain vLLM bit for bit.
    norms = {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}
    room = {"max_model_len": 1024, "kv_cache_memory_bytes": 1 << 30}
    settings = {**settings_of_tests, **room, "ir_op_priority": norms}
    with Scorer(
        demo_model, steps=12, logit_stats=True, keep_mass=True, regions=["document"], engine_args=settings
    ) as s:
        yield s
