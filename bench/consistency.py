"""What consistency training changes: three methods x three seeds at equal budget, held-out questions and wrappers.

    python bench/consistency.py [--steps 100] [--questions 46] [--methods attct,act,bct] [--seeds 0,1,2] [--short]

Trains and evaluates each with headrift's own commands, into runs/bench/consistency (what is done there already is not
repeated), and measures the memory of a training step against the same step from eager attention's full maps.
"""

import ctypes
import gc
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from utils import Child, Stopwatch

QUESTIONS = utils.ROOT / "datasets/consistency_questions.jsonl"
NAMES = {"attct": "AttCT", "act": "ACT", "bct": "BCT"}
# The first held-out questions: they were seen in a run after which the weight of --keep was lowered, from 0.1.
SEEN = 24
# ACT and BCT: of 1e-3 and 3e-3, the one with the lower training loss after 30 steps. AttCT: by the attention distance
# in trainings that held out the hints.
LEARNING_RATES = {"attct": 3e-3, "act": 3e-3, "bct": 1e-3}
MEASURES = {
    "flipped": "answers that flip",
    "right": "right, wrapped",
    "sycophantic": "hinted wrong answer",
    "right_clean": "right, clean",
    "distance": "attention distance",
    "top_weight": "largest weight of a row",
    "alike": "loss on like content",
}
TOKENS = 512  # of the prompt whose training step's memory is measured


class Pace:
    """Trainers of several methods on the same pairs, whose steps take turns."""

    def time(self, model: str, rounds: int) -> dict:
        """Return the seconds of training steps by method."""
        from headrift.consistency.data import DataConfig
        from headrift.consistency.pairs import SYSTEM_PROMPT
        from headrift.consistency.trainer import ANSWERS, TrainConfig, Trainer, TrainingJob

        def step(trainer: Trainer) -> float:
            with Stopwatch() as clock:
                trainer.train_step()
            return clock.seconds

        with tempfile.TemporaryDirectory() as folder:
            data = DataConfig((str(QUESTIONS),), Path(model), SYSTEM_PROMPT, limit=30)
            arms = {}
            for method in NAMES:
                job = TrainingJob(TrainConfig(data=data, out=Path(folder) / method, weights={method: 1.0}))
                trainer = Trainer(job.config, job.layers, job.pairs, job.data.renderer.tokenizer)
                trainer.prepare(job.config.out / ANSWERS)
                arms[method] = partial(step, trainer)
            return {"seconds": {method: times[1:] for method, times in utils.run_in_turns(arms, 1 + rounds).items()}}


NOISE = "The market opens early in the morning and many people come to buy bread and cheese. "
PLANETS = "Which of the planets of the solar system is the largest one, and which is the closest to the sun?"


class Step:
    """One AttCT training step: `headrift` with the rows that matter; `eager` from eager attention's full maps."""

    def measure(self, way: str, model: str, tokens: int) -> dict:
        """Measure a step on a wrapped prompt of about `tokens` tokens: peak bytes above the weights, loss, gradient."""
        import psutil
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from headrift.consistency.models import attach_lora, install, recompute_long_prompts

        pairs = [make_pair(AutoTokenizer.from_pretrained(model), n) for n in (140, tokens)]
        options = {"dtype": torch.float32, "attn_implementation": "sdpa" if way == "headrift" else "eager"}
        base = AutoModelForCausalLM.from_pretrained(model, **options)
        if way == "headrift":
            install(base)
        adapted = attach_lora(base, 8, 16, 0)
        if way == "headrift":
            recompute_long_prompts(base)
        adapted.eval()
        # Everything is loaded and every library warm: what comes now is the step's.
        step_loss(way, adapted, pairs[0]).backward()
        adapted.zero_grad(set_to_none=True)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, which loading made
        loss = step_loss(way, adapted, pairs[1])
        loss.backward()
        gradient = adapted.get_base_model().model.layers[3].self_attn.q_proj.lora_B["default"].weight.grad
        peak = 1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])
        return {"bytes": peak - before, "loss": float(loss.detach()), "gradient": float(gradient.norm())}


def make_pair(tokenizer, tokens: int):
    """Make a pair whose wrapped prompt has about `tokens` tokens, and no more."""
    from headrift.consistency.pairs import PairRenderer, PairText

    renderer, pairs = PairRenderer(tokenizer), []
    while not pairs or len(pairs[-1].wrapped_ids) <= tokens:
        wrapped = (1 + len(pairs)) * NOISE + PLANETS
        pairs.append(renderer.render(PairText("p", "p", PLANETS, wrapped, core=PLANETS)))
    return pairs[-2]


def step_loss(way: str, model, pair):
    """Return the AttCT loss of a pair."""
    import torch

    from headrift.consistency import losses
    from headrift.consistency.models import forward

    decoder = model.get_base_model().base_model
    layers = frozenset(range(decoder.config.num_hidden_layers))
    clean_at, wrapped_at = torch.from_numpy(pair.clean_positions), torch.from_numpy(pair.wrapped_positions)

    def rows(ids: list[int], positions) -> dict:
        queries = positions[pair.first_query :]
        if way == "headrift":
            return forward(decoder, ids, queries.tolist(), layers).rows
        maps = decoder(torch.tensor([ids]), use_cache=False, output_attentions=True).attentions
        return {layer: attention[0][:, queries] for layer, attention in enumerate(maps)}

    with torch.no_grad(), model.disable_adapter():
        clean = rows(pair.clean_ids, clean_at)
    return losses.attct(rows(pair.wrapped_ids, wrapped_at), clean, wrapped_at, clean_at)


def folder_of(method: str, seed: int, args) -> Path:
    return utils.ROOT / f"runs/bench/consistency/{method}-{seed}-{args.steps}-{args.questions}"


def train(method: str, seed: int, args) -> None:
    """Train, or continue; headrift refuses a folder with other settings."""
    folder = folder_of(method, seed, args)
    options = ["--model", args.model, "--out", folder, "--method", method, "--seed", seed, "--steps", args.steps]
    options += ["--lr", LEARNING_RATES[method], *(["--resume"] if (folder / "training.json").exists() else [])]
    utils.headrift("train-consistency", QUESTIONS, *options)


def evaluate(folders: list[Path], args) -> None:
    """Evaluate all at once, since the model before training is then run once; nothing if that was done before."""
    options = {"questions": args.questions, "skip": SEEN}
    paths = [folder / "evaluation.json" for folder in folders]
    before = [utils.read_json(path).get("asked", {}) if path.exists() else {} for path in paths]
    if any(options.items() - done.items() for done in before):
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        utils.headrift("evaluate-consistency", *folders, "--model", args.model, *words)


def over_seeds(values: list[float]) -> dict[str, float]:
    """Return the mean over seeds with its 95% interval by Student's t; no interval for one seed."""
    from scipy import stats

    bounds = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values) or 1e-12) if values[1:] else ()
    return {"mean": float(np.mean(values)), **dict(zip(("low", "high"), map(float, bounds)))}


def by_method(runs: list[dict]) -> dict:
    """Return, by method, the figures before and after over its seeds."""
    results = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        first = own[0]
        results[method] = {
            "held_out": {
                name: {"before": first["held_out"][name]["before"]}
                | {"after": over_seeds([run["held_out"][name]["after"]["value"] for run in own])}
                | {"by_seed": [run["held_out"][name]["after"] for run in own]}
                for name in MEASURES
                if first["held_out"][name]["pairs"]
            },
            "families": {
                name: {"held_out": figures["held_out"], "before": figures["flipped"]["before"]}
                | {"after": over_seeds([run["families"][name]["flipped"]["after"]["value"] for run in own])}
                for name, figures in first["families"].items()
            },
            "layers": {
                "before": first["distance_by_layer"]["before"],
                "after": np.mean([run["distance_by_layer"]["after"] for run in own], 0).tolist(),
            },
            "perplexity_ratio": over_seeds([run["perplexity"]["ratio"]["value"] for run in own]),
            "seconds": [run["seconds"] for run in own],
        }
    return results


def table(report: dict) -> str:
    methods, memory = report["methods"], report["memory"]
    first, names = next(iter(methods.values())), [NAMES[method] for method in methods]
    rows = [
        [words, figure(first["held_out"][name]["before"])]
        + [figure(result["held_out"][name]["after"]) for result in methods.values()]
        for name, words in MEASURES.items()
        if name in first["held_out"]
    ]
    ratios = [figure(result["perplexity_ratio"]) for result in methods.values()]
    rows.append(["perplexity of a neutral text, after / before", 1, *ratios])
    steps = [np.percentile(report["step_seconds"][method], [50, 25, 75]) for method in methods]
    cells = [f"{middle:.2f} ({low:.2f}-{high:.2f})" for middle, low, high in steps]
    rows.append(["seconds of a step: median (quartiles), in turns", "", *cells])
    seconds = [f"{np.median(result['seconds']):.0f}" for result in methods.values()]
    rows.append(["seconds of a training, median", "", *seconds])
    families = [
        [f"{family}{' (held out)' if figures['held_out'] else ''}", figure(figures["before"])]
        + [figure(result["families"][family]["after"]) for result in methods.values()]
        for family, figures in first["families"].items()
    ]
    return utils.page(
        "# Consistency training",
        f"Made by `python bench/consistency.py`: {report['steps']} steps of {report['batch']} pairs, "
        f"{len(report['seeds'])} seeds, {report['questions']} held-out questions; held-out families: "
        f"{', '.join(report['held_out_families'])}. On {report['machine']['cpu']} ({report['machine']['cores']} "
        "cores). Before: 95% bootstrap interval over questions. After: mean and 95% interval (Student's t) over "
        "seeds, which are asked the same questions.",
        utils.markdown(["held out", "before", *names], rows),
        "Answers that flip, by family:",
        utils.markdown(["family", "before", *names], families),
        f"Memory above the weights of an AttCT step with a wrapped prompt of {TOKENS} tokens: "
        f"{memory['headrift'] / 1e6:.0f} MB, {memory['ratio']:.2f} of the {memory['eager'] / 1e6:.0f} MB that it takes "
        "from eager attention's full maps.",
    )


def figure(value: dict) -> str:
    """Show a value before (with its interval) or a mean after, with the bounds that it has."""
    bounds = value["interval"] if "value" in value else [value[end] for end in ("low", "high") if end in value]
    shown = f"{value['value'] if 'value' in value else value['mean']:.3f}"
    return f"{shown} [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else shown


def plot(report: dict, path: Path) -> None:
    """Plot the distance per layer before and after, and the flip rate by family and method."""
    from headrift.figures import new_figure, save

    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2)
    methods, colours = report["methods"], dict(zip(NAMES, ("#D55E00", "#0072B2", "#009E73")))
    first = next(iter(methods.values()))
    families = list(first["families"])
    at, width = np.arange(len(families)), 0.8 / (1 + len(methods))
    left.plot(first["layers"]["before"], color="#000000", label="before")
    before = [first["families"][family]["before"]["value"] for family in families]
    right.bar(at, before, width, color="#595959", label="before")
    for i, (method, result) in enumerate(methods.items(), 1):
        left.plot(result["layers"]["after"], color=colours[method], label=NAMES[method])
        after = [result["families"][family]["after"] for family in families]
        means = np.array([value["mean"] for value in after])
        low, high = (np.array([value.get(end, value["mean"]) for value in after]) for end in ("low", "high"))
        style = {"color": colours[method], "label": NAMES[method], "capsize": 2}
        right.bar(at + i * width, means, width, yerr=[means - low, high - means], **style)
    left.set(xlabel="layer (0: nearest the input)", ylabel="attention distance (L2), held out", ylim=(0, None))
    names = [f"{name.replace('_', chr(10))}{'*' if first['families'][name]['held_out'] else ''}" for name in families]
    right.set_xticks(at + width * len(methods) / 2, names)
    right.set(ylabel="answers that flip (* held-out family)", ylim=(0, 1))
    left.legend()
    right.legend()
    save(figure, path)


def main() -> None:
    options = utils.Options(__doc__, "consistency")
    options.amount("steps", 100, 4, "training steps")
    options.amount("questions", 46, 6, "held-out questions")
    options.add_argument("--methods", default=",".join(NAMES))
    options.add_argument("--seeds", default="0,1,2")
    args = options.parse()
    methods, seeds = args.methods.split(","), [int(seed) for seed in args.seeds.split(",")][: 1 if args.short else None]
    arms = [(method, seed) for seed in seeds for method in methods]
    for arm in arms:
        train(*arm, args)
    evaluate([folder_of(*arm, args) for arm in arms], args)
    runs = []
    for method, seed in arms:
        folder = folder_of(method, seed, args)
        about = {"method": method, "seed": seed, "steps": len((folder / "losses.jsonl").read_text().splitlines())}
        about["seconds"] = utils.read_json(folder / "outcome.json")["seconds"]
        runs.append(about | utils.read_json(folder / "evaluation.json"))
    settings = utils.read_json(folder_of(*arms[0], args) / "training.json")["settings"]
    memory = {}
    for way in ("headrift", "eager"):
        with Child("consistency.py", "step") as child:
            memory[way] = child.call("measure", way=way, model=str(args.model), tokens=TOKENS)["bytes"]
    with Child("consistency.py", "pace") as child:
        seconds = child.call("time", model=str(args.model), rounds=2 if args.short else 8)["seconds"]
    report = {
        "steps": args.steps,
        "batch": settings["batch"],
        "seeds": seeds,
        "questions": runs[0]["questions"],
        "held_out_families": runs[0]["held_out_families"],
        "settings": settings,
        "machine": utils.host(),
        "versions": utils.versions(),
        "methods": by_method(runs),
        "memory": memory | {"ratio": memory["headrift"] / memory["eager"]},
        "step_seconds": seconds,
        "runs": [{key: value for key, value in run.items() if key != "versions"} for run in runs],
    }
    utils.write(report, table(report), args.out)
    plot(report, args.out.with_suffix(".png"))


if __name__ == "__main__":
    utils.run_script(main, pace=Pace, step=Step)
