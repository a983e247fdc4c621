"""Batches that are made up, and decode steps replayed from a captured graph."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor
from vllm import SamplingParams

from headrift.requests import ProbeRequest
from headrift.vllm_plugin.recorder import Recorder
from headrift_kernels import reference
from helpers.steps import describe_step

# Rows of a captured decode step, of which the last two are padding when it is replayed.
ROWS, REAL = 4, 2


def recorder_of(worker) -> Recorder:
    return Recorder.required(worker.vllm_config)


def test_made_up_batches_write_nothing_though_their_row_numbers_are_live(only_once, case, tiny, assert_agrees):
    """The rows of a dummy batch are numbered from 0 (V2: as req_idx), as the requests in flight are."""
    engine, oracle = tiny
    prompts = np.random.default_rng(12).integers(3, 200, (3, 30)).tolist()
    spans = {"system": (2, 14), "user": (15, 24), "prompt": (0, 30)}
    for ids in prompts:
        engine.submit(ProbeRequest(ids, spans, steps=4, ignore_eos=True))
    finished = [done for _ in range(3) for done in engine.step()]
    before = engine.llm_engine.collective_rpc(lambda worker: recorder_of(worker).mass.clone())[0]

    def dummy(worker):
        # Lengths at which the live requests would be at step 4.
        if case["runner"] == "v2":
            worker.model_runner._dummy_run(3, uniform_decode=True, context_len=33)
        else:
            worker.model_runner._dummy_run(3, uniform_decode=True, force_attention=True, profile_seq_lens=34)
        recorder = recorder_of(worker)
        return recorder.mass.clone(), recorder.row_slot.tolist(), recorder.runner_rows.tolist()

    after, row_slot, runner_rows = engine.llm_engine.collective_rpc(dummy)[0]
    assert sum(slot >= 0 for slot in runner_rows) >= 2, "no request is in flight: a weak test"
    assert set(row_slot) == {-1}
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    while engine.running:
        finished += engine.step()
    for done, recording in zip(finished, engine.drain(finished, want_mass=True), strict=True):
        ids = done.request.prompt_ids
        expected = oracle.masses(ids, done.answer_ids, 4, [spans[name] for name in ("system", "user", "prompt")])
        np.testing.assert_allclose(recording.mass, expected, rtol=0, atol=assert_agrees.tolerance)


class Capture(TorchDispatchMode):
    """Stands in for a CUDA graph: the kernels launched inside can be launched again with the very same tensors.

    Whatever else torch would run on the device is an error, since a replay would leave it out.
    """

    VIEWS = (
        "aten.alias",
        "aten.as_strided",
        "aten.expand",
        "aten.select",
        "aten.slice",
        "aten.split",
        "aten.transpose",
    )

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__()
        self.launches: list = []
        launch = GridExecutor.__call__

        def launch_and_keep(executor, *args, **kwargs):
            self.launches.append(lambda: launch(executor, *args, **kwargs))
            with torch.utils._python_dispatch._disable_current_modes():
                return launch(executor, *args, **kwargs)

        patch.setattr(GridExecutor, "__call__", launch_and_keep)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert str(function).startswith((*self.VIEWS, "aten.view", "aten.detach")), f"{function} in a captured step"
        return function(*args, **(kwargs or {}))

    def replay(self) -> None:
        for launch in self.launches:
            launch()


def probe(slot: int, request_id: int, prompt_len: int, regions: list[list[int]]) -> SamplingParams:
    extra = {"slot": slot, "request_id": request_id, "prompt_len": prompt_len, "regions": regions, "steps": 4}
    return SamplingParams(extra_args={"headrift": extra})


def describe_rows(v2: bool):
    """A decode step of 4 rows."""
    other = {"slot_mapping": torch.full((ROWS,), -1), "req_idx": np.arange(ROWS) if v2 else None}
    return describe_step([1] * ROWS, [1] * ROWS, 160, torch.zeros((ROWS, 5), dtype=torch.int32), **other)


def replay_a_captured_step(worker, v2: bool) -> dict:
    """Capture a decode step of 4 rows of one layer with nothing probed, then replay it with 2 probed rows."""
    recorder = recorder_of(worker)
    builder = recorder.publisher
    layer = worker.vllm_config.compilation_config.static_forward_context[builder.layer_names[0]]
    impl = layer.impl
    generator = torch.Generator().manual_seed(0)
    cache = torch.empty_like(layer.kv_cache).normal_(generator=generator)
    heads, size = impl.num_heads, impl.head_size
    query, output = torch.zeros(ROWS, heads, size), torch.full((ROWS, heads, size), torch.nan)
    common = describe_rows(v2)
    before = recorder.mass.clone()
    with pytest.MonkeyPatch.context() as patch:
        graph = Capture(patch)
        metadata = builder.build_for_cudagraph_capture(common)
        with graph:
            impl.forward(layer, query, query, query, cache, metadata, output)
    untouched = torch.equal(recorder.mass.nan_to_num(-1), before.nan_to_num(-1))

    # The runner fills the same tensors for the next step; requests sit in rows (V1) or under req_idx (V2) as they come.
    recorder.runner_rows[:] = -1
    rows = [2, 0] if v2 else [0, 1]
    recorder.runner_rows[rows] = [recorder.admit(probe(3, 10**6, 29, [[0, 5], [5, 20], [0, 29]])),
                                  recorder.admit(probe(1, 10**6 + 1, 44, [[3, 40], [40, 44], [0, 44]]))]  # fmt: skip
    common.req_idx = np.array(rows) if v2 else None
    common.seq_lens.copy_(torch.tensor([31, 44, 0, 0]))
    common.query_start_loc[REAL:] = common.query_start_loc_cpu[REAL:] = REAL  # padding rows have no token
    common.block_table_tensor[:REAL, :2] = torch.tensor([[3, 1], [5, 2]])
    query.normal_(generator=generator)
    recorder.begin_step()
    builder.build(0, common)
    graph.replay()
    recorder.runner_rows[:] = -1
    keys, values = cache.transpose(1, 2).split(size, dim=-1)
    how = {"scale": impl.scale, "window": impl.window, "softcap": impl.logits_soft_cap}
    expected = reference.decode_mass(
        torch.full_like(recorder.mass, torch.nan), impl.layer_index, query, keys, values, common.block_table_tensor,
        common.seq_lens, torch.tensor([3, 1, -1, -1]), recorder.prompt_len, recorder.step_limit, recorder.bounds, **how,
    )  # fmt: skip
    return {"untouched": untouched, "mass": recorder.mass.clone(), "output": output, "expected": expected}


def test_a_replayed_graph_measures_the_rows_of_its_own_step(only_once, case, tiny):
    engine, _ = tiny
    v2 = case["runner"] == "v2"
    (got,) = engine.llm_engine.collective_rpc(lambda worker: replay_a_captured_step(worker, v2))
    assert got["untouched"], "the captured step itself wrote into the recorder"
    expected = got["expected"]
    written = ~torch.isnan(expected.mass)
    assert int(written.sum()) == REAL * expected.output.shape[1] * 3
    # float32 sums of some 40 products against float64
    torch.testing.assert_close(got["mass"][written].double(), expected.mass[written], rtol=0, atol=1e-5)
    torch.testing.assert_close(got["output"][:REAL].double(), expected.output[:REAL], rtol=0, atol=1e-4)
    assert torch.isnan(got["mass"][[1, 3]][~written[[1, 3]]]).all()


def launches_before_a_capture(worker, v2: bool) -> list[str]:
    """Kernels that a builder launches before the first graph with its layers is captured, by name."""
    builder, names, launch = recorder_of(worker).publisher, [], GridExecutor.__call__
    builder.is_warm = False

    def launch_and_name(executor, *args, **kwargs):
        names.append(executor.fn.__name__)
        return launch(executor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch_and_name)
        builder.build_for_cudagraph_capture(describe_rows(v2))
    return names


def test_no_kernels_first_launch_is_inside_a_capture(only_once, case, tiny):
    """On a GPU a first launch loads the kernel's code: "operation not permitted when stream is capturing"."""
    engine, _ = tiny
    v2 = case["runner"] == "v2"
    (names,) = engine.llm_engine.collective_rpc(lambda worker: launches_before_a_capture(worker, v2))
    assert set(names) == {"decode_kernel", "combine_kernel", "replay_kernel", "replay_combine_kernel"}
