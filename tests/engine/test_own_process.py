"""The engine core in a process of its own, as vLLM starts it by default on GPUs."""

import pytest

from headrift.probed_engine import ProbedEngine


@pytest.mark.nightly
def test_masses_from_another_process(
    tiny_model, oracle, settings_of_tests, random_requests, run, assert_agrees, monkeypatch
):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    settings = {**settings_of_tests, "skip_tokenizer_init": True, "max_num_seqs": 8, "max_model_len": 256}
    with ProbedEngine(tiny_model("llama-3to1"), steps=8, slots=12, engine_args=settings) as engine:
        assert type(engine.llm_engine.engine_core).__name__ == "SyncMPClient"
        items = run(engine, random_requests(1, 16, ignore_eos=True))
    assert assert_agrees(oracle("llama-3to1"), items) > 30
