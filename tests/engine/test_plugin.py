"""Opting in, and refusing what cannot be measured, all reasons at once, before any model is loaded."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from headrift import vllm_engine
from headrift.errors import EngineError, RefusedError
from headrift.probed_engine import ProbedEngine
from headrift.vllm_engine import attention_args, engine_config
from headrift.vllm_plugin import plugin
from headrift.vllm_plugin.backends import rows_from
from headrift.vllm_plugin.backends.gpu import count_measured
from headrift.vllm_plugin.instruments import parse_config
from headrift.vllm_plugin.recorder import Recorder, probe_of
from headrift.vllm_plugin.slots import MOST_SPLITS, Place, RecorderConfig
from helpers.steps import describe_step

# First as where headrift is installed and not asked for, then asked for: vLLM's plugins are loaded anew.
OPT_IN = """
import json, os, sys
import vllm.plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
for switched_on in (False, True):
    if switched_on:
        os.environ[sys.argv[1]] = "1"
    vllm.plugins.plugins_loaded = False
    vllm.plugins.load_general_plugins()
    backend = AttentionBackendEnum.CPU_ATTN.get_class()
    print(json.dumps([backend.__module__, sorted(m for m in sys.modules if m.startswith("headrift"))]))
"""


def test_the_plugin_does_nothing_unless_asked(monkeypatch):
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    command = [sys.executable, "-c", OPT_IN, plugin.SWITCH]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (default, loaded), (ours, _) = map(json.loads, done.stdout.splitlines()[-2:])
    assert default == "vllm.v1.attention.backends.cpu_attn"
    assert loaded == ["headrift", "headrift._version", "headrift.vllm_plugin", "headrift.vllm_plugin.plugin"]
    assert ours == "headrift.vllm_plugin.backends.cpu"


def config_of(folder, **options):
    settings = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, **options}
    return EngineArgs(model=str(folder), **settings).create_engine_config()


def test_an_engine_that_can_be_measured_is_not_refused(tiny_model):
    assert plugin.refusals(config_of(tiny_model("llama-3to1"))) == []


def test_every_reason_is_given_at_once(tiny_model):
    config = config_of(tiny_model("llama-3to1"), dtype="float16", enable_prefix_caching=True)
    config.parallel_config.pipeline_parallel_size = 2
    config.parallel_config.decode_context_parallel_size = 2
    config.parallel_config.data_parallel_size = 2
    config.parallel_config.enable_dbo = True
    config.parallel_config.enable_batch_sharded_sampling = True
    config.cache_config.kv_sharing_fast_prefill = True
    config.speculative_config = object()
    reasons = plugin.refusals(config)
    words = ("float16", "pipeline", "context par", "data par", "dual-batch", "sharded", "fast prefill", "speculative")
    for word in words:
        assert sum(word in reason for reason in reasons) == 1, (word, reasons)
    assert len(reasons) == len(words)
    message = str(RefusedError(reasons))
    assert all(reason in message for reason in reasons)


@pytest.mark.parametrize(
    ("attribute", "word"),
    [("use_mla", "MLA"), ("is_encoder_decoder", "encoder"), ("is_hybrid", "mamba"), ("is_mm_prefix_lm", "both")],
)
def test_models_that_are_refused(tiny_model, monkeypatch, attribute, word):
    config = config_of(tiny_model("llama-3to1"))
    monkeypatch.setattr(type(config.model_config), attribute, property(lambda self: True))
    assert [word in reason for reason in plugin.refusals(config)] == [True]


def test_a_model_with_attention_chunks_is_refused(tiny_model):
    config = config_of(tiny_model("llama-3to1"))
    config.model_config.hf_text_config.attention_chunk_size = 128
    assert ["chunks" in reason for reason in plugin.refusals(config)] == [True]


def test_another_vllm_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    assert ["0.99.0" in reason for reason in plugin.refusals(config_of(tiny_model("llama-3to1")))] == [True]


def test_bfloat16_with_amx_is_refused(tiny_model, monkeypatch):
    config = config_of(tiny_model("llama-3to1"), dtype="bfloat16")
    assert plugin.refusals(config) == [] or torch.cpu._is_amx_tile_supported()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert ["AMX" in reason for reason in plugin.refusals(config)] == [True]


def test_the_engine_refuses_before_it_loads(tiny_model):
    settings = {"skip_tokenizer_init": True, "dtype": "float16", "kv_cache_dtype": "auto"}
    with pytest.raises(RefusedError, match="float16"):
        ProbedEngine(tiny_model("llama-3to1"), steps=2, engine_args=settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"no_such_setting": 1}, "no_such_setting"),
        ({"dtype": "float99"}, "float99"),
        ({"dtype": "float32", "skip_tokenizer_init": True, "block_size": 16}, "No common block size for 16"),
    ],
)
def test_engine_settings_vllm_does_not_take(tiny_model, settings, message):
    with pytest.raises(EngineError, match=message):
        ProbedEngine(tiny_model("llama-3to1"), steps=2, engine_args=settings)


def test_one_engine_at_a_time_in_a_process(tiny_model, settings_of_tests):
    settings = {**settings_of_tests, "skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 2}
    first = ProbedEngine(tiny_model("llama-3to1"), steps=2, engine_args=settings)
    with first, pytest.raises(EngineError, match="close it first"):
        ProbedEngine(tiny_model("llama-3to1"), steps=2, engine_args=settings)
    ProbedEngine(tiny_model("llama-3to1"), steps=2, engine_args=settings).close()


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(EngineError, match="nowhere"):
        ProbedEngine(tmp_path / "nowhere", steps=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot": 4}, "slot 4"),
        ({"slot": -1}, "slot -1"),
        ({"steps": 9}, "steps=9: .* steps 0..8"),
        ({"prompt_len": 0}, "at least one"),
        ({"regions": [[0, 1]] * 4}, "4 regions"),
        ({"regions": [[5, 2]]}, "start"),
        ({"colour": "red"}, "colour"),
        ({"keep_as": 0}, "keep_as is off in this engine: set references"),
    ],
)
def test_probes_that_cannot_be_recorded(change, message):
    probe = {"slot": 0, "request_id": 1, "prompt_len": 10, "regions": [[0, 5]], "steps": 4}
    config = parse_config({"slots": 4, "steps": 8})
    assert probe_of(SamplingParams(extra_args={"headrift": probe}), config) is not None
    with pytest.raises(ValueError, match=message):
        probe_of(SamplingParams(extra_args={"headrift": {**probe, **change}}), config)


def test_several_answers_to_one_prompt_are_refused():
    probe = {"slot": 0, "request_id": 1, "prompt_len": 10, "regions": [], "steps": 4}
    with pytest.raises(ValueError, match="n=2"):
        probe_of(SamplingParams(n=2, extra_args={"headrift": probe}), RecorderConfig(slots=1, steps=4))


def make_recorder(**options) -> Recorder:
    config = parse_config({"slots": 2, "steps": 3, "regions": 2, **options})
    return Recorder(config, Place(range(2), range(2)), 4, torch.device("cpu"))


@pytest.fixture
def recorder() -> Recorder:
    return make_recorder()


def probe(slot: int, request_id: int) -> SamplingParams:
    extra = {"slot": slot, "request_id": request_id, "prompt_len": 7, "regions": [[0, 3], [0, 7]], "steps": 2}
    return SamplingParams(extra_args={"headrift": extra})


def publish(recorder: Recorder, rows: list[int], seq_lens: list[int], real: bool = True) -> None:
    """The running step's rows, as a backend's builder publishes them."""
    if real:
        recorder.begin_step()
    recorder.publish(np.array(rows, np.intp), torch.tensor(seq_lens, dtype=torch.int32))


def test_a_new_request_finds_an_empty_slot_and_a_returning_one_its_own(recorder):
    assert recorder.admit(None) == recorder.admit(SamplingParams()) == -1
    assert recorder.admit(probe(1, 10)) == 1
    publish(recorder, [0], [7])
    recorder.mass[1] = 0.5
    recorder.admit(probe(1, 10))
    publish(recorder, [0], [7])
    assert (recorder.mass[1] == 0.5).all(), "preemption and resume wiped the recording"
    recorder.admit(probe(1, 11))
    publish(recorder, [0], [7])
    assert torch.isnan(recorder.mass[1]).all()
    assert recorder.bounds[1].tolist() == [[0, 3], [0, 7]]
    assert recorder.prompt_len[1] == 7
    assert recorder.step_limit[1] == 3


def test_rows_beyond_the_batch_are_not_probed():
    recorder = make_recorder(logit_stats=True)
    recorder.runner_rows[:] = [1, -1, 0, 1]
    recorder.prompt_len[:] = torch.tensor([5, 7])
    publish(recorder, [0, 1, 2], [9, 4, 5])
    assert recorder.probed
    assert recorder.row_slot.tolist() == [1, -1, 0, -1]
    assert recorder.row_step[[0, 2]].tolist() == [2, 0]
    publish(recorder, [1], [4])
    assert not recorder.probed
    assert recorder.row_slot.tolist() == [-1] * 4


def test_a_made_up_batch_is_not_probed_though_its_row_numbers_are_live(recorder):
    recorder.runner_rows[:] = [1, 0, -1, -1]
    publish(recorder, [0, 1], [7, 7])
    assert recorder.row_slot.tolist() == [1, 0, -1, -1]
    publish(recorder, [0, 1], [7, 7], real=False)
    assert recorder.row_slot.tolist() == [-1] * 4


def test_the_last_of_two_requests_between_two_steps_is_installed(recorder):
    recorder.admit(probe(0, 1))
    late = SamplingParams(
        extra_args={"headrift": {"slot": 0, "request_id": 2, "prompt_len": 9, "regions": [[1, 4]], "steps": 1}}
    )
    recorder.admit(late)
    publish(recorder, [0], [9])
    assert recorder.bounds[0].tolist() == [[1, 4], [0, 0]]
    assert (int(recorder.prompt_len[0]), int(recorder.step_limit[0])) == (9, 2)


class Builder:
    """Only its identity counts."""


def test_builders_made_again_publish_in_place_of_the_first(recorder):
    first, second, again, fourth = (Builder() for _ in range(4))
    recorder.add_builder(first, ["layers.1", "layers.2"])
    recorder.add_builder(second, ["layers.0"])
    assert recorder.publisher is first
    recorder.add_builder(again, ["layers.1", "layers.2"])
    assert recorder.publisher is again
    recorder.add_builder(fourth, ["layers.0"])
    assert recorder.publisher is again
    assert set(map(id, recorder.builders.values())) == {id(again), id(fourth)}


def test_what_is_recorded_does_not_compile_the_model_again(tiny_model):
    def name_of_the_compiled_model(**recorded):
        additional = {"headrift": recorded, "instructions": "x"}
        args = {"model": str(tiny_model("llama-3to1")), "dtype": "float32", "skip_tokenizer_init": True}
        attention_args("auto")  # headrift's norms, which it returns, are hashed once a model has been loaded with them
        config = engine_config({**args, "additional_config": additional})
        assert plugin.settings_of(config) == recorded
        return config.compute_hash()

    assert name_of_the_compiled_model(slots=2, steps=3) == name_of_the_compiled_model(slots=4, steps=12)
    other = plugin.AdditionalConfig({"headrift": {}, "instructions": "y"})
    assert other.compute_hash() != plugin.AdditionalConfig({"headrift": {}, "instructions": "x"}).compute_hash()


@pytest.fixture
def hopper(monkeypatch):
    """vLLM's platform as on an H100; FlashAttention 3 unless the configuration asks for another, or heads are large."""
    from vllm.config import get_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends import fa_utils, flash_attn

    def version(head_size=None, supports_fa4_hd256=False, **_):
        if supports_fa4_hd256 and head_size == 256:
            return 4
        return get_current_vllm_config().attention_config.flash_attn_version or 3

    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(current_platform, "get_device_capability", lambda: DeviceCapability(9, 0))
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", version)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", version)


@pytest.mark.parametrize(
    ("model", "options", "word"),
    [
        ("llama-3to1", {"dtype": "bfloat16"}, None),
        ("llama-3to1", {"dtype": "float32"}, "dtype"),
        ("llama-3to1", {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}, "fp8"),
        ("llama-3to1", {"dtype": "bfloat16", "attention_config": {"flash_attn_version": 4}}, "FlashAttention 4"),
        ("gemma3", {"dtype": "bfloat16"}, "FlashAttention 4"),
    ],
)
def test_auto_falls_back_to_triton_if_flash_attention_cannot_attend(
    tiny_model, monkeypatch, hopper, model, options, word
):
    config = config_of(tiny_model(model), **options)
    assert any(word in reason for reason in plugin.flash_misfits(config)) if word else not plugin.flash_misfits(config)
    monkeypatch.setenv(plugin.BACKEND, "flash")
    vllm_engine._fall_back_to_triton(config)
    assert os.environ[plugin.BACKEND] == ("triton" if word else "flash")
    assert (config.attention_config.backend is not None and config.attention_config.backend.name == "TRITON_ATTN") == (
        word is not None
    )


def test_flash_attention_is_not_taken_off_nvidia_gpus(tiny_model):
    assert plugin.flash_misfits(config_of(tiny_model("llama-3to1")))


def test_rows_after_the_decode_rows_keep_their_alignment():
    """At an odd offset into the batch's tensors Triton would compile vLLM's kernel again, in the middle of a job."""
    table = torch.arange(35, dtype=torch.int32).view(5, 7)
    common = describe_step([1, 1, 1, 10, 7], [40, 41, 42, 10, 7], 42, table, req_idx=np.array([4, 3, 2, 1, 0]))
    part = rows_from(common, 3)
    assert (part.num_reqs, part.num_actual_tokens) == (2, 17)
    assert part.query_start_loc.tolist() == [0, 10, 17]
    assert part.seq_lens.tolist() == [10, 7]
    assert torch.equal(part.block_table_tensor, table[3:])
    assert part.slot_mapping.tolist() == list(range(3, 20))
    assert all(t.data_ptr() % 16 == 0 for t in (part.query_start_loc, part.seq_lens, part.block_table_tensor))
    assert common.num_reqs == 5
    assert rows_from(common, 0) is common
    between = rows_from(common, 2, 4)
    assert (between.num_reqs, between.num_actual_tokens) == (2, 11)
    assert between.query_start_loc.tolist() == [0, 1, 11]
    assert between.seq_lens.tolist() == [42, 10]
    assert torch.equal(between.block_table_tensor, table[2:4])
    assert between.slot_mapping.tolist() == list(range(2, 13))


def test_measured_queries_are_counted_without_the_device(recorder):
    """Generating: a prompt's last token alone. Replaying, or again after preemption: queries before a row's last."""
    recorder.prompt_lens[:], recorder.step_limits[:] = [7, 20], [3, 3]
    recorder.slots = np.array([0, -1, 1], np.int32)

    def count(seq_lens: list[int], lengths: list[int]):
        common = SimpleNamespace(seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32))
        return count_measured(recorder, common, np.array(lengths))

    assert count([7, 9, 20], [7, 9, 5]) == (True, 0, 0)  # both prompts end
    assert count([6, 9, 19], [6, 9, 5]) == (False, 0, 0)  # neither does
    assert count([9, 9, 20], [9, 9, 5]) == (True, 2, 1)  # steps 0 and 1 before the last, 2
    assert count([12, 9, 30], [12, 9, 4]) == (True, 3, 1)  # steps 0 to 2; the other is past its steps


def test_splits_are_bounded_by_what_the_kernels_are_compiled_for():
    from headrift_kernels.triton import decode_mass

    assert MOST_SPLITS == decode_mass.MOST_SPLITS
    with pytest.raises(ValueError, match="0 to 32 splits, not 33"):
        RecorderConfig(slots=1, steps=1, splits=MOST_SPLITS + 1)


def test_the_backend_of_a_machine(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert plugin.backend_for("auto", gpu=False) == "cpu"
    assert plugin.backend_for("auto", gpu=True) == "flash"
    assert plugin.backend_for("triton", gpu=True) == "triton"
    for request_options, gpu, why in (
        ("fancy", True, "there is no"),
        ("cpu", True, "CPU build"),
        ("triton", False, "needs a GPU"),
    ):
        with pytest.raises(ValueError, match=why):
            plugin.backend_for(request_options, gpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert plugin.backend_for("triton", gpu=False) == "triton"


def test_flashinfers_place_is_taken_with_a_notice():
    assert "FlashInfer" in plugin.replaces_flashinfer((10, 0))
    assert plugin.replaces_flashinfer((9, 0)) is None
    assert plugin.replaces_flashinfer(None) is None
