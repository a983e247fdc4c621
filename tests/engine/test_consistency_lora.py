"""A LoRA in the engine against transformers with the same matrices added to its weights; adapters that do not fit."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from headrift.consistency.models import LoraError, check_lora
from headrift.errors import EngineError
from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest
from headrift.vllm_engine import lora_args

RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_adapter(folder, model, targets=TARGETS, **config):
    """A random adapter of a model's attention matrices, in the form that peft writes; the model gets it added."""
    folder.mkdir()
    torch.manual_seed(1)
    weights = {}
    for i, layer in enumerate(model.model.layers):
        for name in targets:
            linear = getattr(layer.self_attn, name)
            a = torch.randn(RANK, linear.in_features) / linear.in_features**0.5
            b = torch.randn(linear.out_features, RANK) * 0.2
            at = f"base_model.model.model.layers.{i}.self_attn.{name}"
            weights |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
            linear.weight.data += ALPHA / RANK * (b @ a)
    save_file(weights, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    about |= {"target_modules": list(targets), "lora_dropout": 0.0, "inference_mode": True, **config}
    (folder / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapted(tiny_model, oracle, tmp_path_factory):
    """A tiny model, an adapter for it, and the oracle of both together."""
    base, folder = tiny_model("llama-3to1"), tmp_path_factory.mktemp("adapted")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = write_adapter(folder / "adapter", model)
    model.save_pretrained(folder / "merged")
    return base, adapter, oracle(folder / "merged")


def test_numbers_agree_with_transformers(adapted, oracle, settings_of_tests, random_requests, run, assert_agrees):
    """Masses of mixed, chunked, cached batches, and distances between two requests that both have the adapter."""
    base, adapter, merged = adapted
    check_lora(adapter, base)
    settings = {**settings_of_tests, "skip_tokenizer_init": True, "max_num_seqs": 8, "max_model_len": 256}
    rows = {"row_references": 1, "row_keys": 160}
    with ProbedEngine(base, steps=4, slots=12, lora=adapter, **rows, engine_args=settings) as engine:
        items = run(engine, random_requests(3, 9, steps=4, ignore_eos=True))
        ids = np.random.default_rng(5).integers(3, 200, 90).tolist()
        clean, wrapped, runs = ids[:40] + ids[70:], ids, [(0, 0, 40), (40, 70, 20)]
        regions = {"system": (2, 9), "user": (9, 30)}
        (first,) = run(engine, [ProbeRequest(clean, regions, 4, ignore_eos=True, rows_as=0)])
        how = {"answer_ids": first.done.answer_ids, "rows_against": 0, "aligned": runs}
        (second,) = run(engine, [ProbeRequest(wrapped, regions, 4, **how)])
    assert assert_agrees(merged, items) > 10
    answer = first.done.answer_ids[:4]
    expected = merged.row_distances((clean, answer), (wrapped, answer), runs)
    np.testing.assert_allclose(second.recording.distance, expected, rtol=0, atol=1e-5)
    # Without the adapter the same rows are elsewhere: it is the adapter's numbers that agree.
    plain = oracle("llama-3to1").row_distances((clean, answer), (wrapped, answer), runs)
    assert np.abs(plain - expected).max() > 0.1


def test_peft_reads_the_adapter_as_the_engine_does(adapted, assert_within_units):
    import peft

    base, adapter, merged = adapted
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        logits = peft.PeftModel.from_pretrained(model, str(adapter)).eval()(ids).logits
        # Weights that are added up before or after the product, in each of three layers.
        assert_within_units(logits, merged.model(ids).logits, 256)


@pytest.mark.parametrize("model", ["llama-4to1", "gemma3"])
def test_an_adapter_of_another_model_is_told_before_anything_loads(adapted, tiny_model, model):
    _, adapter, _ = adapted
    with pytest.raises(LoraError, match=r"of another model: its model\.layers\.0\..* has 192 inputs, and that of"):
        check_lora(adapter, tiny_model(model))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"r": 10_000}, "rank 10000 is greater"),
        ({"r": 0}, "positive"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_vllm_cannot_do_with_an_adapter_is_told_before_the_model_loads(tiny_model, tmp_path, config, message):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama-3to1"), dtype=torch.float32)
    adapter = write_adapter(tmp_path / "adapter", model, **config)
    with pytest.raises(EngineError, match=f"vLLM cannot load the adapter in .*{message}"):
        ProbedEngine(tiny_model("llama-3to1"), steps=1, lora=adapter)


@pytest.mark.parametrize(("rank", "most"), [(1, 1), (4, 8), (9, 16)])
def test_the_engine_has_room_for_the_adapters_rank(tiny_model, tmp_path, rank, most):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}), encoding="utf-8"
    )
    assert lora_args(str(tmp_path))["max_lora_rank"] == most
