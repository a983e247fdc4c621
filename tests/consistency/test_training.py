"""Training and evaluation of a tiny model: losses fall, a training that breaks off goes on to the same ones, nothing
held out is trained on, and what cannot be done is said before a model loads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headrift.consistency import trainer
from headrift.consistency.data import DataConfig, batches
from headrift.consistency.evaluation import EvaluationConfig, EvaluationJob
from headrift.consistency.models import ADAPTER_WEIGHTS, LoraError, check_lora
from headrift.consistency.pairs import SYSTEM_PROMPT
from headrift.consistency.trainer import TrainConfig, Trainer, TrainingJob, read_losses
from headrift.corpus.sources import InputError
from headrift.runs.folder import JobError

pytestmark = pytest.mark.usefixtures("tokenizer_once")
QUESTIONS = Path(__file__).parents[2] / "datasets" / "consistency_questions.jsonl"


@pytest.fixture
def config(tiny_model, tmp_path) -> TrainConfig:
    data = DataConfig(inputs=(str(QUESTIONS),), model=tiny_model, system_prompt=SYSTEM_PROMPT, limit=15)
    return TrainConfig(data=data, out=tmp_path / "run", weights={"attct": 1.0}, steps=6, batch=2, learning_rate=5e-3,
                 answer_tokens=4, checkpoint_every=2)  # fmt: skip


@pytest.mark.parametrize(
    "weights", [{"attct": 1.0}, {"act": 1.0}, {"bct": 1.0}, {"attct": 1.0, "act": 0.1, "bct": 0.1}]
)
def test_the_loss_of_every_method_falls_and_the_adapter_is_left(config, weights):
    # The same pair again and again, so that the loss must fall.
    config = replace(config, weights=weights, steps=8, batch=1)
    job = TrainingJob(config)
    job.pairs[:] = job.pairs[:1]
    result = job.run()
    steps = read_losses(config.out)
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"]
    parts = {**weights, "keep": config.keep}
    assert all(step["loss"] == pytest.approx(sum(w * step[name] for name, w in parts.items())) for step in steps)
    assert steps[0]["keep"] == pytest.approx(0, abs=1e-5)  # the adapter has not changed anything yet
    assert steps[-1]["keep"] > 1e-5
    assert result.steps == 8
    check_lora(config.out / "adapter", config.data.model)


def test_nothing_is_kept_where_that_is_not_wanted(config):
    TrainingJob(replace(config, steps=1, keep=0.0)).run()
    assert set(read_losses(config.out)[0]) == {"step", "loss", "attct", "pairs"}


def test_a_training_that_broke_off_goes_on_to_the_same_losses(config, tmp_path):
    weights = {"attct": 1.0, "bct": 0.1}
    config = replace(config, weights=weights)
    TrainingJob(config).run()
    broken = replace(config, out=tmp_path / "broken")

    class Stop(Exception):
        pass

    def stop_at_third(more, seen=[]):  # noqa: B006  a memory between calls is what is wanted
        seen.append(more)
        if len(seen) == 3:
            raise Stop

    with pytest.raises(Stop):
        TrainingJob(broken).run(stop_at_third)
    # As if it had been killed after the checkpoint of step 3 and a fourth step that was not saved.
    with open(broken.out / trainer.LOSSES, "a") as file:
        file.write('{"step": 4, "loss": 99}\n')
    job = TrainingJob(replace(broken, resume=True))
    assert job.done == 3
    job.run()
    assert read_losses(broken.out) == read_losses(config.out)  # bit for bit: the same operations on the same numbers
    ours, theirs = ((out / "adapter" / ADAPTER_WEIGHTS).read_bytes() for out in (broken.out, config.out))
    assert ours == theirs


@pytest.mark.parametrize("place", ["weights changed", "line unwritten"])
def test_a_training_that_broke_off_within_a_step_does_that_step_again(config, tmp_path, monkeypatch, place):
    config = replace(config, steps=4, checkpoint_every=1)
    TrainingJob(config).run()
    broken = replace(config, out=tmp_path / "broken")
    with monkeypatch.context() as patched:
        if place == "weights changed":
            step = torch.optim.AdamW.step
            steps = []

            def stop_after(self, *args, **kwargs):
                step(self, *args, **kwargs)
                steps.append(1)
                if len(steps) == 3:
                    raise KeyboardInterrupt

            patched.setattr(torch.optim.AdamW, "step", stop_after)
        else:
            train_step = Trainer.train_step

            def stop_behind(self):
                line = train_step(self)
                if self.step == 3:
                    raise OSError(28, "no space left on the disk")
                return line

            patched.setattr(Trainer, "train_step", stop_behind)
        with pytest.raises((KeyboardInterrupt, OSError)):
            TrainingJob(broken).run()
    job = TrainingJob(replace(broken, resume=True))
    assert job.done == 2
    job.run()
    assert read_losses(broken.out) == read_losses(config.out)


def test_pairs_that_changed_are_another_training(config, tmp_path):
    rows = [{"clean": f"Add {i} + 2", "wrapped": f"Hurry! Add {i} + 2", "answer": str(i + 2)} for i in range(8)]
    path = tmp_path / "pairs.jsonl"
    config = replace(config, data=replace(config.data, inputs=(str(path),), limit=None))

    def job(**change):
        path.write_text("".join(json.dumps({**row, **change}) + "\n" for row in rows))
        return TrainingJob(replace(config, resume=True))

    job()
    job()
    for change in ({"answer": "99"}, {"core": "+ 2"}):
        with pytest.raises(JobError, match="another pairs"):
            job(**change)


def test_a_training_can_start_from_an_adapter(trained, config):
    """From its very weights."""
    from safetensors.torch import load_file

    config = replace(config, lora=trained / "adapter", rank=3)
    TrainingJob(replace(config, minutes=1e-9)).run()
    first, then = (load_file(folder / "adapter" / ADAPTER_WEIGHTS) for folder in (trained, config.out))
    assert first.keys() == then.keys()
    for name, weight in first.items():
        torch.testing.assert_close(then[name], weight, rtol=0, atol=0)
    TrainingJob(replace(config, steps=2, resume=True)).run()
    # What is kept as it was is the model without the adapter, which by now is another.
    assert read_losses(config.out)[0]["keep"] > 1e-4


def test_seeds_differ_and_repeat(config, tmp_path):
    def losses_of(name, seed):
        one = replace(config, out=tmp_path / name, seed=seed, steps=2)
        TrainingJob(one).run()
        return [(step["loss"], step["pairs"]) for step in read_losses(one.out)]

    assert losses_of("a", 0) == losses_of("b", 0) != losses_of("c", 1)


def test_nothing_held_out_is_trained_on(config):
    job = TrainingJob(config)
    held_out = json.loads((config.out / trainer.TRAINING).read_text())["held_out"]
    assert held_out["families"]
    assert len(held_out["questions"]) == 3
    assert not {pair.question for pair in job.pairs} & set(held_out["questions"])
    assert not {pair.family for pair in job.pairs} & set(held_out["families"])
    job.run()
    trained = {name for step in read_losses(config.out) for name in step["pairs"]}
    assert trained <= {pair.id for pair in job.pairs}


def test_only_the_layers_that_were_named_matter(config, tmp_path):
    one = replace(config, layers=(0,), steps=1)
    TrainingJob(one).run()
    both = replace(config, steps=1, out=tmp_path / "both")
    TrainingJob(both).run()
    assert read_losses(one.out)[0]["loss"] != read_losses(both.out)[0]["loss"]


def test_the_current_models_clean_side_moves_and_the_initial_ones_does_not(config, tmp_path):
    current = replace(config, target="current", out=tmp_path / "current")
    for one in (config, current):
        TrainingJob(one).run()
    first, second = read_losses(config.out), read_losses(current.out)
    assert first[0]["loss"] == second[0]["loss"]  # the adapter has changed nothing yet
    assert first[-1]["loss"] != second[-1]["loss"]


def test_minutes_end_a_training(config):
    result = TrainingJob(replace(config, steps=1000, minutes=1e-9)).run()
    assert result.steps == 0


def test_every_pair_comes_once_before_any_comes_again():
    drawn = batches(10, 4, seed=3)
    first = [next(drawn) for _ in range(5)]
    flat = [i for some in first for i in some]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    again = batches(10, 4, seed=3, first=2)
    assert [next(again) for _ in range(3)] == first[2:]


# ------------------------------------------------------------------------------------------------ what is turned down


@pytest.fixture
def no_model(monkeypatch):
    """Whatever loads a model fails the test."""
    import transformers

    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": {"magic": 1.0}}, "--method magic"),
        ({"weights": {"attct": 0.0}}, "at least one above 0"),
        ({"weights": {"attct": -1.0}}, "0 or more"),
        ({"layers": (1, 2)}, "layers are 0 to 1"),
        ({"target": "other"}, "initial or current"),
        ({"learning_rate": 0.0}, "must be above 0"),
        ({"lora": Path("nowhere")}, "adapter_config.json"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_loads(config, no_model, change, says):
    with pytest.raises(ValueError, match=says):
        TrainingJob(replace(config, **change))
    assert not config.out.exists()


def test_inputs_that_cannot_be_trained_on_are_refused(config, no_model, tmp_path):
    def job(rows, **change):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return TrainingJob(replace(config, data=replace(config.data, inputs=(str(path),), **change)))

    with pytest.raises(InputError, match="no `answer`"):
        job([{"question": "What is it?"}])
    unlike = [{"clean": f"One {i} two three", "wrapped": "Nothing of that"} for i in range(10)]
    with pytest.raises(InputError, match="no question in common"):
        job(unlike)
    with pytest.raises(InputError, match="both pairs and questions"):
        job([*unlike, {"question": "What?", "answer": "x", "wrong": "y"}])
    with pytest.raises(ValueError, match="choose from"):
        TrainingJob(replace(config, data=replace(config.data, held_out_families=("poetry",))))
    with pytest.raises(ValueError, match="--model"):
        TrainingJob(replace(config, data=replace(config.data, model=tmp_path / "none")))


def test_a_folder_with_something_in_it_is_left_alone(config, no_model):
    config.out.mkdir()
    (config.out / "mine.txt").write_text("mine")
    with pytest.raises(JobError, match="not empty"):
        TrainingJob(config)
    shutil.rmtree(config.out)
    TrainingJob(config)
    with pytest.raises(JobError, match="--resume"):
        TrainingJob(config)
    with pytest.raises(JobError, match="another learning_rate, another seed"):
        TrainingJob(replace(config, resume=True, seed=5, learning_rate=1e-5))
    TrainingJob(replace(config, resume=True, steps=99))  # more steps are no other training
    (config.out / trainer.CHECKPOINT).write_bytes(b"malformed")
    with pytest.raises(JobError, match="is damaged"):
        _ = TrainingJob(replace(config, resume=True)).done


def test_an_adapter_of_another_model_is_refused(config, no_model, tmp_path, random_models):
    from safetensors.torch import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()

    def write(shape, name="model.layers.0.self_attn.q_proj", kind="LORA"):
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        save_file({f"base_model.model.{name}.lora_A.weight": torch.zeros(shape)}, adapter / "adapter_model.safetensors")

    write((4, 99))
    with pytest.raises(LoraError, match=r"another model: its model\.layers\.0\.self_attn\.q_proj has 99 inputs"):
        TrainingJob(replace(config, lora=adapter))
    write((4, 128), "model.layers.7.self_attn.q_proj")
    with pytest.raises(LoraError, match=r"another model: .* has no model.layers.7"):
        TrainingJob(replace(config, lora=adapter))
    write((4, 128))
    with pytest.raises(LoraError, match=r"has 1 layers, and .* 2"):
        TrainingJob(replace(config, lora=adapter))
    write((4, 128), kind="PREFIX_TUNING")
    with pytest.raises(LoraError, match="is not a LoRA"):
        TrainingJob(replace(config, lora=adapter))
    (adapter / "adapter_model.safetensors").write_bytes(b"malformed")
    with pytest.raises(LoraError, match="cannot be read"):
        TrainingJob(replace(config, lora=adapter))


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A finished training of the tiny model."""
    data = DataConfig(inputs=(str(QUESTIONS),), model=tiny_model, system_prompt=SYSTEM_PROMPT, limit=60)
    out = tmp_path_factory.mktemp("trained") / "run"
    config = TrainConfig(
        data=data, out=out, weights={"attct": 1.0}, steps=20, batch=2, learning_rate=1e-2, answer_tokens=4
    )
    TrainingJob(config).run()
    return out


def test_an_evaluation_measures_what_was_held_out(trained):
    job = EvaluationJob(EvaluationConfig(trained))
    held_out = json.loads((trained / trainer.TRAINING).read_text())["held_out"]
    assert {pair.question for pair in job.pairs} == set(held_out["questions"])
    assert len(job.pairs) == 4 * 12
    done, prompts = [], job.prompts
    result = job.run(done.append)
    assert sum(done) == prompts
    assert json.loads((trained / "evaluation.json").read_text()) == result
    replies = [json.loads(line) for line in (trained / "replies.jsonl").read_text().splitlines()]
    assert [row["question"] for row in replies] == [pair.question for pair in job.pairs]
    held_in = [row for row in replies if row["family"] not in job.families]
    for name in ("flipped", "distance", "sycophantic"):
        for state in ("before", "after"):
            own = [row[state][name] for row in replies if row["family"] in job.families]
            own = [value for value in own if value is not None]  # a pair without a hint has no hint to follow
            assert len(own) == result["held_out"][name]["pairs"]
            if own:
                assert np.mean(own) == pytest.approx(result["held_out"][name][state]["value"])
    assert len(held_in) == 3 * 12
    assert set(result["families"]) == {"opinion_hint", "role_play", "authority_urgency", "irrelevant_context"}
    assert [name for name, figures in result["families"].items() if figures["held_out"]] == held_out["families"]
    distance = result["held_out"]["distance"]
    # 20 steps of training on just this bring it down, on wrappers that were not trained on too.
    assert distance["after"]["value"] < distance["before"]["value"]
    assert distance["change"]["interval"][1] < 0
    assert len(result["distance_by_layer"]["before"]) == 2
    for figures in result["held_out"].values():
        if figures["pairs"]:
            assert set(figures) == {"pairs", "questions", "before", "after", "change"}
    # A random model of 49,152 tokens is about as good as guessing.
    assert 1e4 < result["perplexity"]["before"]["value"] < 1e7
    with_interval = result["held_out"]["flipped"]["before"]
    assert with_interval["interval"][0] <= with_interval["value"] <= with_interval["interval"][1]
    # Asked the same again, the model as it was is not asked a second time, and all is the same.
    again = EvaluationJob(EvaluationConfig(trained))
    again.share_before(job)
    assert again.prompts == prompts // 2
    assert again.run() == result
    fewer = EvaluationJob(EvaluationConfig(trained, questions=3))
    left = fewer.prompts
    fewer.share_before(job)
    assert fewer.prompts == left


def test_an_evaluation_without_a_training_is_refused(trained, no_model, tmp_path, random_models):
    with pytest.raises(JobError, match="is not a training"):
        EvaluationJob(EvaluationConfig(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    shutil.rmtree(copy / "adapter")
    with pytest.raises(JobError, match="is not finished"):
        EvaluationJob(EvaluationConfig(copy))
    other = tmp_path / "other"
    shutil.copytree(json.loads((trained / trainer.TRAINING).read_text())["about"]["model"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    with pytest.raises(JobError, match="is not the model that was trained"):
        EvaluationJob(EvaluationConfig(trained, model=other))
