"""Masses on regions, entropies and sentences' instability, from one engine, against transformers' eager attention."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import entr

from headrift import signal
from headrift.internals import attention
from headrift.internals.attention import REGIONS, summarise_entropy, summarise_regions
from headrift.internals.job import ATTENTION, INSTABILITY, InternalsConfig, InternalsJob
from headrift.signal import Window

STEPS = 3


@pytest.fixture(scope="module")
def looked(tiny_model, tmp_path_factory):
    """A job with attention, and the masses of every result in order, before they are stored as float16."""
    folder = tmp_path_factory.mktemp("looked")
    (folder / "systems").mkdir()
    (folder / "systems" / "kind.txt").write_text("Be kind to everybody you meet, and say so. Never be rude.")
    (folder / "prompts.txt").write_text("Where do puffins nest?\nWhy is the sea salty?\n")
    prompts = (str(folder / "prompts.txt"),)
    config = InternalsConfig(tiny_model, folder / "systems", prompts, folder / "out", steps=STEPS, drop_sentences=2)
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        plain = attention.region_masses

        def keep(result):
            kept.append((result, plain(result)))
            return kept[-1][1]

        patch.setattr(attention, "region_masses", keep)
        job = InternalsJob(config)
        results = job.run()
    return job, results, kept


@pytest.fixture(scope="module")
def eager(tiny_model):
    """Of a prompt with these answer tokens fed: attention [steps, layers, heads, keys] from its last token on."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    def attentions(prompt: list[int], fed: list[int]) -> np.ndarray:
        with torch.inference_mode():
            rows = model(torch.tensor([[*prompt, *fed]]), output_attentions=True).attentions
        return torch.stack([layer[0, :, len(prompt) - 1 :] for layer in rows]).permute(2, 0, 1, 3).double().numpy()

    return attentions


def test_regions_and_entropies_are_those_of_eager_attention(looked, eager):
    job, _, kept = looked
    cases = [case for part in job._parts for kind in attention.KINDS for case in part.cases]
    assert len(kept) == len(cases) == 8
    for i, (case, (result, mass)) in enumerate(zip(cases, kept)):
        rendered = case.neutral if i // 2 % 2 else case.system
        n = len(rendered.token_ids)
        rows = eager(rendered.token_ids, result.answer_ids[: len(mass) - 1])
        expected = {
            "system": rows[..., slice(*rendered.system)].sum(-1),
            "user": rows[..., slice(*rendered.question)].sum(-1),
            "last_five": rows[..., n - 5 : n].sum(-1),
            "generated": rows[..., n:].sum(-1),
        }
        expected["template"] = rows[..., :n].sum(-1) - expected["system"] - expected["user"]
        for j, region in enumerate(REGIONS):
            # What the kernels are held to (tests/engine): two float32 softmaxes over 60 keys.
            np.testing.assert_allclose(mass[..., j], expected[region], atol=2e-5)
        # The same probabilities, times their logarithms of up to some 10.
        np.testing.assert_allclose(result.attention_entropy, entr(rows).sum(-1), atol=2e-4)


def test_sentences_instability_is_that_of_eager_attention_along_one_answer(looked, eager):
    job, results, kept = looked
    part = job._parts[0]
    answers = {case.question.number: result.answer_ids for case, (result, _) in zip(part.cases, kept)}
    rows = job.table(INSTABILITY).to_pylist()
    assert len(rows) == len(part.drops) == 4
    for row, drop in zip(rows, part.drops):
        assert (row["prompt"], row["sentence"], row["text"]) == (drop.question.number, drop.sentence, drop.text)
        fed = answers[drop.question.number][:STEPS]
        for name, rendered in (("whole", drop.whole), ("dropped", drop.dropped), ("neutral", drop.neutral)):
            attended = eager(rendered.token_ids, fed)
            share = attended[..., slice(*rendered.system)].sum(-1) / attended[..., : len(rendered.token_ids)].sum(-1)
            score = signal.score(signal.instability(share), Window(1, STEPS), n_steps=len(fed))
            # Means and spreads of shares, which are held to this.
            assert row[name] == pytest.approx(score.value, abs=2e-5)
        assert row["effect"] == pytest.approx(row["whole"] - row["neutral"])
        assert row["effect_dropped"] == pytest.approx(row["whole"] - row["dropped"])
    instability = results["numbers"]["instability"]
    assert instability["effect"]["value"] == pytest.approx(np.mean([row["effect"] for row in rows]))
    assert (instability["effect"]["rows"], instability["effect"]["prompts"]) == (4, 2)
    assert {row["sentence"] for row in instability["sentences"]} == {0, 1}
    assert any("instability" in one["measure"] for one in results["findings"]["Which phrases matter?"])


def test_regions_as_stored_and_summarised(looked):
    job, results, kept = looked
    table = job.table(ATTENTION)
    assert table.num_rows == 8
    first = np.array(table["mass"][0].as_py()).reshape(-1, 2, 4, len(REGIONS))
    np.testing.assert_allclose(first, kept[0][1], atol=5e-4)  # float16: eleven bits
    summary = summarise_regions(table, 2)
    own = [mass for _, mass in kept[:2]]
    np.testing.assert_allclose(
        summary["mass"]["none_to_system"].value, np.mean([mass.mean((0, 2)) for mass in own], axis=0), atol=5e-4
    )
    lengths, n = table["region_tokens"][0].as_py(), table["prompt_tokens"][0].as_py()
    assert sum(lengths[:3]) == n
    assert lengths[3] == 5
    # Over all tokens of the prompt, what a token gets is the average, but for what the answer gets.
    per_token, mass = summary["per_token"]["none_to_system"].value, summary["mass"]["none_to_system"].value
    assert np.all((per_token[:, :3] > 0) & np.isfinite(per_token[:, :3]))
    np.testing.assert_allclose(mass[:, [0, 1, 2, 4]].sum(-1), 1, atol=2e-3)
    assert "attention to system prompt" in results["findings"]["Where does the model look?"][0]["measure"]
    assert (job.config.out / "report-files" / "regions_by_head.png").exists()


def test_entropies_as_stored_and_summarised(looked):
    job, written, kept = looked
    table = job.table(ATTENTION)
    results = [result for result, _ in kept]
    first = np.array(table["entropy"][0].as_py()).reshape(-1, 2, 4)
    np.testing.assert_allclose(first, results[0].attention_entropy, rtol=1e-3)  # float16: eleven bits
    summary = summarise_entropy(table, 2)
    assert summary["rows"] == 4
    for kind, own in (("none_to_system", results[:2]), ("none_to_neutral", results[2:4])):
        nats = [[each.attention_entropy[0].mean(1), each.attention_entropy[1:].mean((0, 2))] for each in own]
        np.testing.assert_allclose(summary["nats"][kind].value, np.mean(nats, axis=0).T, rtol=1e-3)
        keys = [np.log(each.prompt_tokens + np.arange(len(each.shares)))[:, None, None] for each in own]
        over = [each.attention_entropy / of_steps for each, of_steps in zip(own, keys)]
        relative = [[each[0].mean(1), each[1:].mean((0, 2))] for each in over]
        np.testing.assert_allclose(summary["relative"][kind].value, np.mean(relative, axis=0).T, rtol=1e-3)
        assert np.all((summary["relative"][kind].value > 0) & (summary["relative"][kind].value <= 1))
    system, neutral = (summary["relative"][kind].value.mean(0) for kind in attention.KINDS)
    np.testing.assert_allclose(summary["difference"].value, system - neutral)
    np.testing.assert_allclose(summary["by_system"].value[0], summary["difference"].value)  # there is one system prompt
    assert any("entropy" in one["measure"] for one in written["findings"]["Where does the model look?"])
    assert (job.config.out / "report-files" / "entropy.png").exists()


def test_a_sliding_window_is_all_that_a_layer_may_see():
    """Attention that is the same to every key has a relative entropy of 1, in layers of both kinds."""
    import pyarrow as pa

    windows = (None, 8)
    seen = np.array([[20, 8], [21, 8], [22, 8]])
    record = {"system": "a", "prompt": 0, "id": "0", "prompt_tokens": 20, "region_tokens": [], "steps": 3, "mass": []}
    entropy = np.repeat(np.log(seen)[..., None], 2, -1).astype(np.float16).ravel()
    rows = [record | {"kind": kind, "entropy": entropy} for kind in attention.KINDS]
    summary = summarise_entropy(pa.Table.from_pylist(rows, schema=attention.schema(2, 2, windows)), 1)
    np.testing.assert_allclose(summary["relative"]["none_to_system"].value, 1, rtol=1e-3)  # float16
    np.testing.assert_allclose(summary["nats"]["none_to_system"].value[:, 0], np.log([20, 8]), rtol=1e-3)
