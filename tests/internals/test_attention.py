"""Masses on regions, from one engine, against transformers' eager attention."""

from __future__ import annotations

import numpy as np
import pytest

from headrift.internals import attention
from headrift.internals.attention import REGIONS
from headrift.internals.estimates import Prompts
from headrift.internals.job import ATTENTION, Asked, InternalsJob
from headrift.internals.regions import regions


@pytest.fixture(scope="module")
def looked(tiny_model, tmp_path_factory):
    """A job with attention, and the masses of every result in order, before they are stored as float16."""
    folder = tmp_path_factory.mktemp("looked")
    (folder / "systems").mkdir()
    (folder / "systems" / "kind.txt").write_text("Be kind to everybody you meet, and say so.")
    (folder / "prompts.txt").write_text("Where do puffins nest?\nWhy is the sea salty?\n")
    prompts = (str(folder / "prompts.txt"),)
    asked = Asked(tiny_model, folder / "systems", prompts, folder / "out", steps=3, drop_sentences=0)
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        plain = attention.masses

        def keep(result):
            kept.append((result, plain(result)))
            return kept[-1][1]

        patch.setattr(attention, "masses", keep)
        job = InternalsJob(asked)
        found = job.run()
    return job, found, kept


def test_regions_are_those_of_eager_attention(looked, tiny_model):
    import torch
    import transformers

    job, _, kept = looked
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cases = [case for part in job._parts for kind in attention.KINDS for case in part.cases]
    assert len(kept) == len(cases) == 8
    for i, (case, (result, mass)) in enumerate(zip(cases, kept)):
        rendered = case.neutral if i // 2 % 2 else case.system
        ids, n = rendered.token_ids, len(rendered.token_ids)
        fed = [*ids, *result.answer_ids[: len(mass) - 1]]
        with torch.inference_mode():
            rows = model(torch.tensor([fed]), output_attentions=True).attentions
        eager = torch.stack([of[0, :, n - 1 : n - 1 + len(mass)] for of in rows]).permute(2, 0, 1, 3).double().numpy()
        expected = {
            "system": eager[..., slice(*rendered.system)].sum(-1),
            "user": eager[..., slice(*rendered.question)].sum(-1),
            "last_five": eager[..., n - 5 : n].sum(-1),
            "generated": eager[..., n:].sum(-1),
        }
        expected["template"] = eager[..., :n].sum(-1) - expected["system"] - expected["user"]
        for j, region in enumerate(REGIONS):
            # What the kernels are held to (tests/engine): two float32 softmaxes over 60 keys.
            np.testing.assert_allclose(mass[..., j], expected[region], atol=2e-5)


def test_what_is_stored_and_said_of_regions(looked):
    job, found, kept = looked
    table = job.table(ATTENTION)
    assert table.num_rows == 8
    first = np.array(table["mass"][0].as_py()).reshape(-1, 2, 4, len(REGIONS))
    np.testing.assert_allclose(first, kept[0][1], atol=5e-4)  # float16: eleven bits
    of = regions(table, 2, Prompts(2))
    own = [mass for _, mass in kept[:2]]
    np.testing.assert_allclose(
        of.mass["none_to_system"].value, np.mean([mass.mean((0, 2)) for mass in own], axis=0), atol=5e-4
    )
    lengths, n = table["region_tokens"][0].as_py(), table["prompt_tokens"][0].as_py()
    assert sum(lengths[:3]) == n
    assert lengths[3] == 5
    # Over all tokens of the prompt, what a token gets is the average, but for what the answer gets.
    per_token, mass = of.per_token["none_to_system"].value, of.mass["none_to_system"].value
    assert np.all((per_token[:, :3] > 0) & np.isfinite(per_token[:, :3]))
    np.testing.assert_allclose(mass[:, [0, 1, 2, 4]].sum(-1), 1, atol=2e-3)
    assert any("Attention to the system prompt" in said for said in found["findings"]["Where does the model look?"])
    assert (job.asked.out / "report-files" / "regions_by_head.png").exists()
