"""What consistency training changes: three methods x three seeds at equal budget, held-out questions and wrappers.

    python bench/consistency.py [--steps 100] [--questions 40] [--methods attct,act,bct] [--seeds 0,1,2] [--short]
                                [--keep-timing]

First each method's learning rate is chosen (`tune`): all methods try the same rates, with the same steps, seed and
questions, and the one after which the fewest held-in answers flip is taken. The questions that this asks are in no
evaluation. Trains and evaluates with headrift's own commands, into runs/bench/consistency (what is done there already
is not repeated). Measures the memory of a training step against the same step from eager attention's full maps, and
its seconds; --keep-timing keeps these two as the last report has them, on a machine that is not quiet.
"""

import ctypes
import gc
import json
import re
import shutil
import sys
import tempfile
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from utils import Child, Stopwatch

QUESTIONS = utils.ROOT / "datasets/consistency_questions.jsonl"
NAMES = {"attct": "AttCT", "act": "ACT", "bct": "BCT"}
FOLDER = utils.ROOT / "runs/bench/consistency"
HELD_OUT = ("role_play",)
# Of the questions left, after those that trainings before were chosen with: see `write_questions`.
HELD_OUT_QUESTIONS = 0.25
LEARNING_RATES = (1e-3, 3e-3)
ALSO_SEEN = "cq-f-070"  # held out instead of another one by an earlier version's split
MEASURES = {
    "flipped": "answers that flip",
    "right": "right, wrapped",
    "sycophantic": "hinted wrong answer",
    "right_clean": "right, clean",
    "distance": "attention distance",
    "top_weight": "largest weight of a row",
    "alike": "loss on like content",
}
COMPARED = ("flipped", "right", "right_clean", "distance")  # between methods
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


class Answers:
    """The answers of trained models to held-in pairs: those of the families that are not held out."""

    def flips(self, model: str, folders: list[str], questions: int) -> dict:
        """Return, for each training, which answers to the first held-out questions flip before and after it."""
        import peft

        from headrift.consistency.answers import flipped
        from headrift.consistency.evaluation import EvaluationConfig, EvaluationJob
        from headrift.consistency.models import generate, load_model

        def answer(network, job: EvaluationJob, pairs: list) -> list[dict]:
            tokenizer = job.tokenizer
            prompts = list(dict.fromkeys(tuple(ids) for pair in pairs for ids in (pair.clean_ids, pair.wrapped_ids)))
            answers = generate(network, tokenizer, prompts, job.max_tokens)
            texts = dict(zip(prompts, tokenizer.batch_decode(answers, skip_special_tokens=True)))
            own = [(texts[tuple(pair.clean_ids)], texts[tuple(pair.wrapped_ids)], pair.key) for pair in pairs]
            return [{"flipped": float(flipped(*one))} for one in own]

        before, results = None, []
        for folder in folders:
            job = EvaluationJob(EvaluationConfig(Path(folder), questions=questions, model=Path(model)))
            pairs = [pair for pair in job.pairs if pair.family not in HELD_OUT]
            network = peft.PeftModel.from_pretrained(load_model(Path(model)), str(Path(folder) / "adapter")).eval()
            with network.disable_adapter():
                before = before or answer(network, job, pairs)
            about = [{"question": pair.question, "family": pair.family} for pair in pairs]
            after = answer(network, job, pairs)
            results.append([own | {"before": a, "after": b} for own, a, b in zip(about, before, after)])
            print(folder, flush=True)
        return {"replies": results}


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


def write_questions() -> Path:
    """Write the questions that no choice was made with before: all but those that --split-seed 0 holds out.

    The weight of --keep, and learning rates of earlier versions, were chosen by evaluations that asked some of these.
    """
    from headrift.consistency.data import read_pairs, split

    seen = split(read_pairs([str(QUESTIONS)]).texts()).questions | {ALSO_SEEN}
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines(keepends=True)
    path = FOLDER / "questions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line for line in lines if json.loads(line)["id"] not in seen), encoding="utf-8")
    return path


def train(folder: Path, method: str, rate: float, seed: int, steps: int, args) -> None:
    """Train, or continue; headrift refuses a folder with other settings."""
    options = ["--model", args.model, "--out", folder, "--method", method, "--seed", seed, "--steps", steps]
    options += ["--lr", rate, "--held-out-questions", HELD_OUT_QUESTIONS]
    options += [word for family in HELD_OUT for word in ("--held-out-family", family)]
    options += ["--resume"] if (folder / "training.json").exists() else []
    utils.headrift("train-consistency", FOLDER / "questions.jsonl", *options)


def evaluate(folders: list[Path], args, **options: int) -> list[list[dict]]:
    """Evaluate all at once, since the model before training is then run once; nothing if that was done before.

    Args:
        options: `questions` and `skip` of evaluate-consistency.

    Returns:
        By folder, the replies and measures of each pair.
    """
    paths = [folder / "evaluation.json" for folder in folders]
    before = [utils.read_json(path).get("asked", {}) if path.exists() else {} for path in paths]
    if any(options.items() - done.items() for done in before):
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        utils.headrift("evaluate-consistency", *folders, "--model", args.model, *words)
    texts = [(folder / "replies.jsonl").read_text(encoding="utf-8") for folder in folders]
    return [[json.loads(line) for line in text.splitlines()] for text in texts]


def tune(methods: list[str], args) -> dict:
    """Choose each method's learning rate by the flips of held-in wrapper families, on questions of its own."""
    arms = [(method, rate) for method in methods for rate in LEARNING_RATES]
    folders = {(method, rate): FOLDER / f"tune-{method}-{rate:g}-{args.tune_steps}" for method, rate in arms}
    for (method, rate), folder in folders.items():
        if not (folder / "adapter").exists():
            train(folder, method, rate, 0, args.tune_steps, args)
    with Child("consistency.py", "answers") as child:
        given = {"model": str(args.model), "folders": [*map(str, folders.values())]}
        held_in = child.call("flips", questions=args.tune_questions, **given)["replies"]
    flips = {arm: mean(rows, "after", "flipped") for arm, rows in zip(arms, held_in)}
    tried = {method: {f"{rate:g}": flips[method, rate] for rate in LEARNING_RATES} for method in methods}
    return {
        "steps": args.tune_steps,
        "questions": len({row["question"] for row in held_in[0]}),
        "pairs": len(held_in[0]),
        "families": sorted({row["family"] for row in held_in[0]}),
        "before": mean(held_in[0], "before", "flipped"),
        "flipped": tried,
        "chosen": {
            method: min(own, key=lambda rate: (own[rate]["value"], float(rate))) for method, own in tried.items()
        },
    }


def values_of(rows: list[dict], state: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a measure of rows, and the numbers of their questions; rows that do not have it are left out."""
    valid = [row for row in rows if row[state][name] is not None]
    question = np.unique([row["question"] for row in valid], return_inverse=True)[1] if valid else np.zeros(0, int)
    return np.array([row[state][name] for row in valid], float), question


def mean(rows: list[dict], state: str, name: str) -> dict | None:
    """Return the mean of a measure over rows, of one seed or several, with its 95% interval over questions."""
    from headrift.consistency.evaluation import RATES
    from headrift.consistency.summary import mean_estimate
    from headrift.stats import ClusterBootstrap

    values, question = values_of(rows, state, name)
    if not len(values):
        return None
    every, bootstrap = np.ones(len(values), bool), ClusterBootstrap(question)
    result = mean_estimate(bootstrap, values, question, every, is_rate=name in RATES)
    return result | {"questions": int(question.max()) + 1}


def difference(one: list[dict], other: list[dict], name: str, comparisons: int) -> dict:
    """Return the difference of a measure after training by two methods, paired by question.

    The interval is of 95% for all `comparisons` together (Bonferroni).
    """
    from scipy.stats import norm

    from headrift.consistency.evaluation import RATES
    from headrift.stats import ClusterBootstrap, change_interval, percentile_bounds

    (values, question), (others, other_question) = (values_of(rows, "after", name) for rows in (one, other))
    n = int(question.max()) + 1
    per_question, per_other = (
        np.bincount(index, own) / np.bincount(index) for index, own in ((question, values), (other_question, others))
    )
    change, numbers = per_question - per_other, np.arange(n)
    if name in RATES:
        interval = change_interval(change, numbers, float(norm.isf(0.025 / comparisons)))
    else:
        draws = ClusterBootstrap(numbers, 10_000).mean(change, numbers >= 0)
        interval = percentile_bounds(draws[1:], n, comparisons)
    return {"value": float(change.mean()), "interval": interval and list(interval), "questions": n}


def perplexity_ratio(runs: list[dict]) -> dict:
    """Return a neutral text's perplexity after training over that before, with its interval over passages."""
    from headrift.consistency.summary import estimate
    from headrift.stats import ClusterBootstrap

    nats = [run["perplexity"]["nats_by_passage"] for run in runs]
    change = np.mean([np.subtract(own["after"], own["before"]) for own in nats], axis=0)
    passages = np.arange(len(change))
    return estimate(np.exp(ClusterBootstrap(passages).mean(change, passages >= 0)), passages)


def by_method(runs: list[dict], replies: list[list[dict]]) -> dict:
    """Return, by method, the figures before and after over its seeds."""
    results = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [i for i, run in enumerate(runs) if run["method"] == method]
        rows = [row for i in own for row in replies[i]]
        held_out = [row for row in rows if row["family"] in HELD_OUT]
        first = [row for row in replies[own[0]] if row["family"] in HELD_OUT]
        families = {name: [row for row in rows if row["family"] == name] for name in runs[own[0]]["families"]}
        results[method] = {
            "held_out": {
                name: {"before": before, "after": mean(held_out, "after", name)}
                | {"by_seed": [runs[i]["held_out"][name]["after"] for i in own]}
                for name in MEASURES
                if (before := mean(first, "before", name))
            },
            "families": {
                name: {"held_out": name in HELD_OUT, "after": mean(some, "after", "flipped")}
                | {"before": mean(some[: len(some) // len(own)], "before", "flipped")}
                for name, some in families.items()
            },
            "layers": {
                "before": runs[own[0]]["distance_by_layer"]["before"],
                "after": np.mean([runs[i]["distance_by_layer"]["after"] for i in own], 0).tolist(),
            },
            "perplexity_ratio": perplexity_ratio([runs[i] for i in own]),
        }
    return results


def compare(runs: list[dict], replies: list[list[dict]]) -> dict:
    """Return the paired differences of held-out measures between each two methods."""
    rows = {}
    for run, own in zip(runs, replies):
        rows.setdefault(run["method"], []).extend(row for row in own if row["family"] in HELD_OUT)
    pairs = list(combinations(rows, 2))
    return {
        name: {f"{one} - {other}": difference(rows[one], rows[other], name, len(pairs)) for one, other in pairs}
        for name in COMPARED
    }


def table(report: dict) -> str:
    methods, memory, tuning = report["methods"], report["memory"], report["tuning"]
    first, names = next(iter(methods.values())), [NAMES[method] for method in methods]
    rows = [
        [words, first["held_out"][name]["before"]["questions"], figure(first["held_out"][name]["before"])]
        + [figure(result["held_out"][name]["after"]) for result in methods.values()]
        for name, words in MEASURES.items()
        if name in first["held_out"]
    ]
    ratios = [figure(result["perplexity_ratio"]) for result in methods.values()]
    rows.append(["perplexity of a neutral text, after / before", "", 1, *ratios])
    families = [
        [f"{family}{' (held out)' if figures['held_out'] else ''}", figure(figures["before"])]
        + [figure(result["families"][family]["after"]) for result in methods.values()]
        for family, figures in first["families"].items()
    ]
    tried = [
        [NAMES[method], rate, figure(flips), "chosen" if rate == tuning["chosen"][method] else ""]
        for method, own in tuning["flipped"].items()
        for rate, flips in own.items()
    ]
    pairs = [
        [MEASURES[name], " - ".join(NAMES[method] for method in pair.split(" - ")), figure(own, "+.3f"), verdict(own)]
        for name, differences in report["differences"].items()
        for pair, own in differences.items()
    ]
    steps = [np.percentile(report["step_seconds"][method], [50, 25, 75]) for method in methods]
    cells = [f"{middle:.2f} ({low:.2f}-{high:.2f})" for middle, low, high in steps]
    timed = report["timed"]
    return utils.page(
        "# Consistency training",
        f"Made by `python bench/consistency.py`: {report['steps']} steps of {report['batch']} pairs, "
        f"{len(report['seeds'])} seeds, {report['questions']} held-out questions that no setting was chosen with; "
        f"held-out families: {', '.join(report['held_out_families'])}. On {report['machine']['cpu']} "
        f"({report['machine']['cores']} cores).",
        "Before: one model. After: mean over the seeds, which are asked the same questions. In brackets: 95% intervals "
        "over questions (passages, for the perplexity), for these seeds: from resampling questions; of rates "
        "Clopper-Pearson's, questions being the trials.",
        utils.markdown(["held out", "questions", "before", *names], rows),
        "Answers that flip, by family:",
        utils.markdown(["family", "before", *names], families),
        "Methods against each other, paired by question. The intervals of a measure's "
        f"{len(next(iter(report['differences'].values()), []))} comparisons are of 95% together (Bonferroni), and not "
        "adjusted for the number of measures.",
        utils.markdown(["held out", "methods", "difference", "verdict"], pairs),
        "## Learning rates",
        f"Chosen alike for all methods: {tuning['steps']} steps with seed 0, then the rate of answers that flip "
        f"*held in*: in the trained families ({', '.join(tuning['families'])}), over {tuning['pairs']} pairs of "
        f"{tuning['questions']} questions that are neither trained on nor in the tables above. Before training: "
        f"{figure(tuning['before'])}. The rate with the fewest flips is chosen, the lower one of two with as many; the "
        "intervals say how sure that choice is.",
        utils.markdown(["method", "learning rate", "held-in answers that flip", ""], tried),
        "## Cost",
        f"Measured on {timed['machine']['cpu']} ({timed['machine']['cores']} cores)"
        f"{', with an earlier version of this report' if timed['earlier'] else ''}.",
        utils.markdown(["", *names], [["seconds of a step: median (quartiles), in turns", *cells]]),
        f"Memory above the weights of an AttCT step with a wrapped prompt of {TOKENS} tokens: "
        f"{memory['headrift'] / 1e6:.0f} MB, {memory['ratio']:.2f} of the {memory['eager'] / 1e6:.0f} MB that it takes "
        "from eager attention's full maps.",
    )


def figure(value: dict, digits: str = ".3f") -> str:
    """Show a value with its interval, if it has one."""
    bounds = value["interval"] and " [{:{d}}, {:{d}}]".format(*value["interval"], d=digits)
    return f"{value['value']:{digits}}{bounds or ''}"


def verdict(value: dict) -> str:
    from headrift.stats import side

    return {None: "no difference shown", 1: "more", -1: "less"}[side(value["interval"], 0)]


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
        means = np.array([value["value"] for value in after])
        low, high = np.transpose([value["interval"] for value in after])
        style = {"color": colours[method], "label": NAMES[method], "capsize": 2}
        right.bar(at + i * width, means, width, yerr=np.maximum([means - low, high - means], 0), **style)
    left.set(xlabel="layer (0: nearest the input)", ylabel="attention distance (L2), held out", ylim=(0, None))
    names = [f"{name.replace('_', chr(10))}{'*' if first['families'][name]['held_out'] else ''}" for name in families]
    right.set_xticks(at + width * len(methods) / 2, names)
    right.set(ylabel="answers that flip (* held-out family)", ylim=(0, 1))
    left.legend()
    right.legend()
    save(figure, path)


def time_steps(args) -> dict:
    """Measure a step's memory and seconds, or take them from the last report (--keep-timing)."""
    if args.keep_timing:
        last = utils.read_json(args.out)
        timed = last.get("timed", {"machine": last["machine"]}) | {"earlier": True}
        return {"memory": last["memory"], "step_seconds": last["step_seconds"], "timed": timed}
    memory = {}
    for way in ("headrift", "eager"):
        with Child("consistency.py", "step") as child:
            memory[way] = child.call("measure", way=way, model=str(args.model), tokens=TOKENS)["bytes"]
    with Child("consistency.py", "pace") as child:
        seconds = child.call("time", model=str(args.model), rounds=2 if args.short else 8)["seconds"]
    memory["ratio"] = memory["headrift"] / memory["eager"]
    return {"memory": memory, "step_seconds": seconds, "timed": {"machine": utils.host(), "earlier": False}}


def main() -> None:
    options = utils.Options(__doc__, "consistency")
    options.amount("steps", 100, 4, "training steps")
    options.amount("questions", 40, 6, "held-out questions")
    options.amount("tune-steps", 40, 2, "training steps of a learning rate that is tried")
    options.amount("tune-questions", 30, 6, "questions that learning rates are chosen with")
    options.add_argument("--methods", default=",".join(NAMES))
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--keep-timing", action="store_true", help="seconds and memory as in the last report")
    args = options.parse()
    methods, seeds = args.methods.split(","), [int(seed) for seed in args.seeds.split(",")][: 1 if args.short else None]
    write_questions()
    tuning = tune(methods, args)
    utils.write_json(tuning, FOLDER / "tuning.json")
    arms = [(method, seed) for seed in seeds for method in methods]
    folders = []
    for method, seed in arms:
        rate = tuning["chosen"][method]
        folder, tuned = (
            FOLDER / f"{method}-{rate}-{seed}-{args.steps}",
            FOLDER / f"tune-{method}-{rate}-{args.tune_steps}",
        )
        if seed == 0 and args.steps >= args.tune_steps and not folder.exists():
            # The same training, so far. Not its evaluation, which asks other questions.
            shutil.copytree(tuned, folder, ignore=shutil.ignore_patterns("evaluation.json", "replies.jsonl"))
        train(folder, method, float(rate), seed, args.steps, args)
        folders.append(folder)
    replies = evaluate(folders, args, questions=args.questions, skip=args.tune_questions)
    runs = []
    for (method, seed), folder in zip(arms, folders):
        about = {"method": method, "seed": seed, "steps": len((folder / "losses.jsonl").read_text().splitlines())}
        runs.append(about | utils.read_json(folder / "evaluation.json"))
    settings = utils.read_json(folders[0] / "training.json")["settings"]
    report = {
        "steps": args.steps,
        "batch": settings["batch"],
        "seeds": seeds,
        "questions": runs[0]["questions"],
        "held_out_families": runs[0]["held_out_families"],
        "settings": settings,
        "machine": utils.host(),
        "versions": utils.versions(),
        "tuning": tuning,
        "methods": by_method(runs, replies),
        "differences": compare(runs, replies),
        **time_steps(args),
        "runs": [{key: value for key, value in run.items() if key != "versions"} for run in runs],
    }
    utils.write(report, table(report), args.out)
    plot(report, args.out.with_suffix(".png"))


if __name__ == "__main__":
    utils.run_script(main, answers=Answers, pace=Pace, step=Step)
