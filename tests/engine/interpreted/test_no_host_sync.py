"""A measured step is enqueued without the host ever waiting for the device.

Every tensor that lives on a GPU in a real run is replaced, in a real engine's steps, by one that refuses to tell the
host anything: its values, or a shape that depends on them. What builds the step's metadata and what attends is then
run as it is.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from headrift.requests import ProbeRequest
from headrift.vllm_plugin.recorder import Recorder

# Asking a CUDA tensor for any of these makes the host wait for it.
WAITS = {
    *(getattr(torch.Tensor, name) for name in ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select")),
    *(getattr(torch.Tensor, name) for name in ("__bool__", "__int__", "__float__", "__index__", "__array__")),
    *(torch.nonzero, torch.unique, torch.masked_select, torch.equal, torch.allclose),
}


class OnDevice(torch.Tensor):
    """A tensor of which the host knows nothing but its shape."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in WAITS:
            raise AssertionError(f"the host waits for the device: {function.__name__}")
        if function is torch.Tensor.__getitem__ and not isinstance(args[0], torch.Tensor):
            raise AssertionError("a host value is looked up by a device tensor")
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index):
                raise AssertionError("the host waits for the device: a boolean index has a shape that depends on data")
        return super().__torch_function__(function, types, args, kwargs or {})


def on_device(value):
    return value.as_subclass(OnDevice) if isinstance(value, torch.Tensor) else value


def off_device(value):
    return value.as_subclass(torch.Tensor) if isinstance(value, OnDevice) else value


def test_the_stand_in_refuses():
    x = torch.arange(4).as_subclass(OnDevice)
    for ask in (
        lambda: x[0].item(),
        lambda: bool(x.sum() > 1),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x[x > 1],
        lambda: (x > 1).nonzero(),
        lambda: range(4)[x[1]],
    ):
        with pytest.raises(AssertionError, match="waits"):
            ask()
    assert isinstance(x[:2] + 1, OnDevice)


def put_on_device(engine, patch: pytest.MonkeyPatch) -> list:
    """Recorder, metadata, activations, cache and scales on the stand-in device, which kernels see through.

    Returns what each layer's forward pass will have measured.
    """
    steps: list = []

    def install(worker):
        recorder = Recorder.required(worker.vllm_config)
        sides = recorder.instrument("Ablation").sides.values()
        for owner in (recorder, *recorder.instruments, *sides):
            for name, value in vars(owner).items():
                if isinstance(value, torch.Tensor):
                    patch.setattr(owner, name, on_device(value))
        for instrument in recorder.instruments:
            patch.setattr(instrument, "_per_slot", [on_device(tensor) for tensor in instrument._per_slot])
            kept = {name: on_device(tensor) for name, tensor in instrument._kept.items()}
            patch.setattr(instrument, "_kept", kept)
        for name in ("scratch", "kernel_options"):
            patch.setattr(recorder, name, {key: on_device(value) for key, value in getattr(recorder, name).items()})
        for layer in worker.vllm_config.compilation_config.static_forward_context.values():
            for name in ("_q_scale", "_k_scale", "_v_scale"):
                patch.setattr(layer, name, on_device(getattr(layer, name)))
        builder, implementation = type(recorder.publisher), type(layer.impl)
        build, forward = builder.build, implementation.forward

        def build_on_device(self, common_prefix_len, common, fast_build=False):
            for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"):
                setattr(common, name, on_device(getattr(common, name)))
            return build(self, common_prefix_len, common, fast_build)

        def forward_on_device(self, layer, query, key, value, kv_cache, metadata, output, **quantized):
            steps.append((metadata is not None and metadata.measured) or None)
            tensors = map(on_device, (query, key, value, kv_cache))
            return off_device(forward(self, layer, *tensors, metadata, on_device(output), **quantized))

        patch.setattr(builder, "build", build_on_device)
        patch.setattr(implementation, "forward", forward_on_device)

    engine.llm_engine.collective_rpc(install)
    launch = GridExecutor.__call__

    def launch_off_device(self, *args, **kwargs):
        return launch(self, *map(off_device, args), **{name: off_device(value) for name, value in kwargs.items()})

    patch.setattr(GridExecutor, "__call__", launch_off_device)
    return steps


def test_a_measured_step_never_waits(only_once, tiny, assert_agrees):
    engine, oracle = tiny
    # Two of these prompts fill a step of 64 tokens: the first answer while the others are prefilled.
    prompts = np.random.default_rng(11).integers(3, 200, (4, 30)).tolist()
    spans = {"system": (2, 14), "user": (15, 24), "prompt": (0, 30)}
    of_rows = [{"rows_as": 0, "row_entropy": True}, {"rows_against": 0, "aligned": [(0, 0, 9)]}]
    requests = [ProbeRequest(ids, spans, 3, ignore_eos=True, **entry) for ids, entry in zip(prompts[1:3], of_rows)]
    entries = [(0, 1, "undifferentiated"), (1, 0, "scaling"), (1, 2, "mean_output"), (1, 3, "mean_query")]
    ablated = ProbeRequest(prompts[3], spans, 3, ignore_eos=True, ablate=entries, keep_as=0, compare_with=0)
    unprobed = ProbeRequest(prompts[0], {}, 3, ignore_eos=True, probed=False)
    finished = []
    for request in [*requests, ablated, unprobed]:
        engine.submit(request)
    with pytest.MonkeyPatch.context() as patch:
        steps = put_on_device(engine, patch)
        while engine.running:
            finished += engine.step()
    recordings = iter(engine.drain(finished, want_mass=True))
    items = [SimpleNamespace(done=f, recording=next(recordings) if f.request.probed else None) for f in finished]
    with oracle.ablated(entries):
        assert assert_agrees(oracle, [item for item in items if item.done.request.ablate]) == 4
    assert assert_agrees(oracle, [item for item in items if not item.done.request.ablate]) == 2 * 4
    measured = [step for step in steps if step is not None]
    assert any(step.prefill is None for step in measured), "no decode step was measured"
    assert any(step.prefill and step.prefill.start for step in measured), (
        "no step with decode and prefill rows was measured"
    )
