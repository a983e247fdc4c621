"""Is it the same number as the slow way, and how much faster: the same prompts by headrift and by what people do now.

    python bench/peers.py [--prompts FILE --system FILE] [--nnsight PYTHON] [--turns 4] [--short]

- transformers with eager attention and `output_attentions`, one prompt at a time (what headrift replaces; once more
  with torch's memory in huge pages, which headrift asks for) and in batches padded on the left;
- headrift generating (default settings, and not with --short as `headrift score --compile` has it) and replaying, which
  gets the answers that generating gave;
- nnsight, one prompt at a time, in a Python of its own (--nnsight: one with `pip install nnsight==0.8.1`).

All are greedy, float32, and record the masses of steps 0 to 12 of all heads. Each way is a process, stopped while
another works. In a turn the slow ways take one block of the shuffled prompts, so all prompts once in all turns;
headrift takes all prompts, with an empty prefix cache. Rates are all prompts over all seconds. Cold: from the start of
the process until 10 prompts are done. The slow ways get token ids, and OpenMP's own settings; headrift renders and
tokenises in the time that is counted. The peak is the best float32 matrix product of the model's own shapes, measured
beside each turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from utils import Child, Shapes, Stopwatch, keys_attended

REGIONS = ("system", "user", "prompt")
EAGER, BATCHED, GENERATE, REPLAY = "transformers, one at a time", "transformers, batched", "generate", "replay"
COMPILED = "generate, compiled"
EAGER_HUGE = "transformers, one at a time, huge pages"
NNSIGHT, PLUGIN = "nnsight", "vllm-lens"
SLOW = (EAGER, EAGER_HUGE, BATCHED, NNSIGHT)
# Whether torch asks the kernel for huge pages. headrift has it do so; by itself it does not.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
BATCH = 16
COLD = 10
PLUGIN_PACKAGE = "vllm-lens==1.3.0"


# ------------------------------------------------------------------------------------------------- child processes


class Scored:
    """A Scorer. Results are never taken from earlier ones (`repeat_bytes=0`)."""

    def start(self, model: str, **options: Any) -> dict[str, Any]:
        from headrift import Scorer

        self._shapes = Shapes.read(Path(model))
        self._scorer = Scorer(model, repeat_bytes=0, **options)
        self._finished: list[Any] = []
        engine, step = self._scorer.engine, self._scorer.engine.step

        def noted() -> list[Any]:
            finished = step()
            self._finished += finished
            return finished

        engine.step = noted
        return {}

    def run(self, rows: Sequence[dict[str, Any]], *, replay: bool = False, out: str | None = None) -> dict[str, Any]:
        """Score the rows, with nothing in the prefix cache.

        Args:
            rows: Prompts, with `response_ids` if they are replayed.
            replay: Whether to replay.
            out: A file for masses and answers as Eager.run writes them, which then leave the device too, and for the
                scores s0, s1, ...
        """
        scorer = self._scorer
        forget(scorer)
        scorer.keep_mass = out is not None
        self._finished.clear()
        with Stopwatch() as clock:
            results = list(scorer.score(rows, replay=replay))
        rejected = [result for result in results if not hasattr(result, "shares")]
        if rejected:
            raise ValueError(f"prompts that cannot be scored: {rejected[:3]}")
        if out is not None:
            arrays = {f"m{result.index}": result.mass for result in results}
            arrays |= {f"s{result.index}": np.nan if result.score is None else result.score for result in results}
            np.savez(out, **arrays, **{f"a{result.index}": result.answer_ids for result in results})
        return {
            "seconds": clock.seconds,
            "cpu_seconds": clock.cpu_seconds,
            "prompt_tokens": sum(result.prompt_tokens for result in results) / len(results),
            "system_tokens": sum(result.system_tokens for result in results) / len(results),
            "answers": [result.answer_ids for result in results],
            "flops": sum(map(self._flops, self._finished)),
        }

    def _flops(self, done: Any) -> int:
        """What the engine computed for a request: no token that came from the cache."""
        fed, logits = len(done.request.prompt_ids) + len(done.answer_ids) - 1, len(done.answer_ids)
        if done.request.answer_ids is not None:
            fed, logits = len(done.request.prompt_ids) + done.n_steps, 1
        tokens = fed - done.cached_tokens
        return self._shapes.flops(tokens, keys_attended(done.cached_tokens, tokens), logits)


def forget(scorer: Any) -> None:
    """Empty a scorer's prefix cache."""
    scorer.engine.llm_engine.reset_prefix_cache()
    scorer._primed.clear()


class Eager:
    """transformers in float32 with eager attention: greedy answers and their masses, prompts in batches."""

    def start(self, model: str, batch: int) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._batch = batch
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        self._model.eval()
        return {}

    def run(self, prompts: list[dict[str, Any]], steps: int, eos: int, out: str) -> dict[str, Any]:
        """Answer the prompts.

        Args:
            prompts: `ids` and `regions` of each.
            steps: Recorded steps.
            eos: The end-of-text token.
            out: A file for m0, m1, ... [steps, layers, heads, regions] and the answers a0, a1, ...
        """
        import torch

        answers: list[tuple[Any, list[int]]] = []
        with Stopwatch() as clock, torch.inference_mode():
            for first in range(0, len(prompts), self._batch):
                answers += self._answer(prompts[first : first + self._batch], steps, eos)
        arrays = {f"m{i}": masses for i, (masses, _) in enumerate(answers)}
        np.savez(out, **arrays, **{f"a{i}": answer for i, (_, answer) in enumerate(answers)})
        return {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds}

    def _answer(self, prompts: list[dict[str, Any]], steps: int, eos: int) -> list[tuple[Any, list[int]]]:
        """Masses of the recorded steps, and the answer's tokens with the end of text, of each prompt of a batch."""
        import torch

        n, width = len(prompts), max(len(prompt["ids"]) for prompt in prompts)
        padding = [width - len(prompt["ids"]) for prompt in prompts]
        fed = torch.tensor([[eos] * pad + prompt["ids"] for pad, prompt in zip(padding, prompts)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, answers, masses = None, [[] for _ in prompts], [[] for _ in prompts]
        for _ in range(steps + 1):
            options = {"attention_mask": mask, "position_ids": position, "past_key_values": cache, "use_cache": True}
            output = self._model(fed, **options, output_attentions=True, logits_to_keep=1)
            rows = torch.stack([layer[:, :, -1] for layer in output.attentions], 1)
            tokens = output.logits[:, -1].argmax(-1).tolist()
            for i, (token, prompt) in enumerate(zip(tokens, prompts)):
                if answers[i][-1:] == [eos]:
                    continue
                spans = [rows[i, ..., padding[i] + start : padding[i] + end] for start, end in prompt["regions"]]
                masses[i].append(torch.stack([span.sum(-1) for span in spans], -1).numpy())
                answers[i].append(token)
            if all(answer[-1:] == [eos] for answer in answers):
                break
            cache = output.past_key_values
            fed = torch.tensor(tokens)[:, None]
            mask = torch.cat([mask, torch.ones(n, 1, dtype=mask.dtype)], 1)
            position = position[:, -1:] + 1
        return [(np.stack(steps_of_one), answer) for steps_of_one, answer in zip(masses, answers)]


class Traced(Eager):
    """nnsight on transformers, one prompt at a time. Attention rows are reduced inside the trace, as headrift does."""

    def start(self, model: str) -> dict[str, Any]:
        import torch
        from nnsight import LanguageModel

        self._batch = 1
        self._model = LanguageModel(model, dtype=torch.float32, attn_implementation="eager", dispatch=True)
        return {"versions": {name: version(name) for name in ("nnsight", "torch", "transformers")}}

    def _answer(self, prompts: list[dict[str, Any]], steps: int, eos: int) -> list[tuple[Any, list[int]]]:
        """As Eager's; generation continues for all steps, and what comes after `eos` is cut off."""
        import torch

        (prompt,), model = prompts, self._model
        options = {"max_new_tokens": steps + 1, "eos_token_id": -1, "do_sample": False}
        with model.generate(torch.tensor([prompt["ids"]]), **options) as tracer:
            masses = list().save()  # noqa: C408  a list of nnsight's
            for _ in tracer.iter[: steps + 1]:
                rows = []
                for layer in model.model.layers:
                    row = layer.self_attn.output[1][0, :, -1]
                    rows.append(torch.stack([row[:, start:end].sum(-1) for start, end in prompt["regions"]], -1))
                masses.append(torch.stack(rows))
            tokens = tracer.result.save()
        answer = tokens[0, len(prompt["ids"]) :].tolist()
        answer = answer[: answer.index(eos) + 1] if eos in answer else answer
        return [(torch.stack(masses).numpy()[: len(answer)], answer)]


# ------------------------------------------------------------------------------------------------- the measurement


def render(rows: list[dict[str, Any]], system: str, model: Path) -> list[dict[str, Any]]:
    """Return the rows as token ids with the regions' ranges, as headrift renders them."""
    from headrift.prepare import load_tokenizer
    from headrift.prompts import ChatRenderer, chat_messages

    renderer = ChatRenderer(load_tokenizer(str(model), False))
    prompts = [renderer.render(chat_messages(row["prompt"], system)) for row in rows]
    return [{"ids": p.token_ids, "regions": [p.regions[name] for name in REGIONS]} for p in prompts]


def why_no_plugin() -> str:
    """Return what pip says when it is to install the vLLM plugin that records attention."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--target", folder, PLUGIN_PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return f"pip did not say within 120 s whether {PLUGIN_PACKAGE} can be installed"
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    if done.returncode:
        return f"pip install {PLUGIN_PACKAGE}: {' '.join(errors) or done.stderr.strip()[-300:]}"
    return f"{PLUGIN_PACKAGE} can be installed here, but this script does not drive it"


class Ways(ExitStack):
    """The processes, started one after another, each with its cold run."""

    def __init__(self, args: Namespace, rows: list[dict[str, Any]], prompts: list[dict[str, Any]], eos: int):
        super().__init__()
        self._args, self._rows, self._prompts, self._eos = args, rows, prompts, eos
        self._folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self._children: dict[str, Child] = {}
        self.cold: dict[str, dict[str, float]] = {}
        self.versions: dict[str, str] = {}
        self.answers: list[list[int]] = []

    @property
    def names(self) -> list[str]:
        return list(self._children)

    def start(self, name: str) -> None:
        """Start a way and have it do its first prompts."""
        model, first = str(self._args.model), range(min(COLD, len(self._prompts)))
        # As they come: headrift's settings of OpenMP are headrift's.
        environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
        environment[HUGE_PAGES] = "1" if name == EAGER_HUGE else "0"
        if name in (EAGER, EAGER_HUGE, BATCHED):
            child = Child("peers.py", "transformers", environment=environment)
            options = {"batch": BATCH if name == BATCHED else 1}
        elif name == NNSIGHT:
            child, options = Child("peers.py", "nnsight", environment=environment, python=self._args.nnsight), {}
        else:
            child, options = Child("peers.py", "headrift"), self._headrift(name)
        self._children[name] = self.enter_context(child)
        about = child.call("start", model=model, **options)
        self.versions |= about.get("versions", {})
        started = child.seconds_since_start
        self.run(name, list(first))
        self.cold[name] = {"prompts": len(first), "start_s": started, "seconds": child.seconds_since_start}
        print(f"{name}: started in {started:.1f} s, {len(first)} prompts {child.seconds_since_start:.1f} s", flush=True)

    def compile(self) -> None:
        """Have torch.compile compile the model, where it has not yet: what is timed is a start that finds it done."""
        with Child("peers.py", "headrift") as child:
            child.call("start", model=str(self._args.model), **self._headrift(COMPILED))

    def _headrift(self, name: str) -> dict[str, Any]:
        """What headrift is started with for this way."""
        settings = {"kv_cache_memory_bytes": utils.KV_BYTES}
        settings |= {"enforce_eager": False} if name == COMPILED else {}
        return {"steps": self._args.steps, "engine_args": settings}

    def run(self, name: str, which: list[int], *, keep: bool = False) -> dict[str, Any]:
        """Have a way do these prompts. keep: headrift hands out its masses too (the others always do)."""
        child, out = self._children[name], str(self._file(name))
        if name in SLOW:
            prompts = [self._prompts[i] for i in which]
            return child.call("run", prompts=prompts, steps=self._args.steps, eos=self._eos, out=out)
        rows = [self._rows[i] for i in which]
        if name == REPLAY:
            rows = [{**row, "response_ids": self.answers[i]} for i, row in zip(which, rows)]
        return child.call("run", rows=rows, replay=name == REPLAY, out=out if keep else None)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """What the way's last run left."""
        with np.load(self._file(name)) as file:
            return dict(file)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name.replace(' ', '-')}.npz"


def agreement(ours: Mapping[str, list], expected: Mapping[str, list], rows: list[dict], steps: int) -> dict[str, Any]:
    """Compare two ways' masses, answers and scores by prompt; masses up to the first token that differs."""
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score

    differences, same = [], 0
    names = ("masses", "answers")
    for mass, other_mass, answer, other in zip(*(way[name] for name in names for way in (ours, expected))):
        alike = next((i for i, (a, b) in enumerate(zip(answer, other)) if a != b), min(len(answer), len(other)))
        same += answer == other
        n = min(alike + 1, len(mass), len(other_mass), steps + 1)
        differences.append(np.abs(mass[:n].astype(np.float64) - other_mass[:n]).ravel())
    cells, labels = np.concatenate(differences), [row.get("label") == "attack" for row in rows]
    ranked = [[-1.0 if score is None else score for score in way["scores"]] for way in (ours, expected)]
    auroc = [roc_auc_score(labels, scores) if 0 < sum(labels) < len(labels) else None for scores in ranked]
    return {
        "same_answers": same,
        "masses_compared": len(cells),
        "largest_difference": float(cells.max()),
        "mean_difference": float(cells.mean()),
        "spearman_of_scores": float(spearmanr(*ranked).statistic),
        "auroc": auroc[0],
        "auroc_expected": auroc[1],
    }


def scores_of(masses: list[np.ndarray], answers: list[list[int]], steps: int) -> list[float | None]:
    """Return headrift's score of each prompt, from its masses."""
    from headrift import signal

    window = signal.Window(1, steps)
    system, prompt = REGIONS.index("system"), REGIONS.index("prompt")
    scores = []
    for mass, answer in zip(masses, answers):
        share = signal.share(mass[..., system], mass[..., prompt])
        n = signal.n_steps(len(answer), steps)
        scores.append(signal.score(signal.instability(share), window, n_steps=n).value)
    return scores


def table(report: Mapping[str, Any]) -> list[str]:
    """Return the lines of the report's page."""
    prompts, peak = report["prompts"], report["peak"]
    ways = [
        [name, utils.cell(way["prompts_per_second"], 2), utils.cell(way["ratio"], 2), f"{way['cold']['seconds']:.1f}"]
        + [f"{way['cold']['prompts'] / way['cold']['seconds']:.2f}", f"{way['peak_bytes'] / 1e9:.2f}"]
        for name, way in report["ways"].items()
    ]
    ways += [[name, f"not measured: {why}", "", "", "", ""] for name, why in report["not_measured"].items()]
    compared = []
    for name, way in report["agreement"].items():
        auroc = [f"{x:.4f}" if x is not None else "" for x in (way["auroc"], way["auroc_expected"])]
        differences = [f"{way[f'{kind}_difference']:.1e}" for kind in ("largest", "mean")]
        cells = [way["same_answers"], f"{way['masses_compared']:,}", *differences, f"{way['spearman_of_scores']:.5f}"]
        compared.append([name, *cells, f"{auroc[0]} and {auroc[1]}"])
    head = ["way", "same answers", "masses compared", "largest difference", "mean difference", "rank correlation"]
    rates = ", ".join(f"{rows}: {max(by_name.values()):.0f}" for rows, by_name in peak["rates"]["gflops"].items())
    return [
        utils.title(report, "headrift and other ways to the same numbers"),
        "",
        f"Made by `bench/peers.py`: {prompts['n']} prompts of {prompts['file']}, {prompts['mean_tokens']:.0f} tokens",
        f"in the mean, {prompts['system_tokens']:.0f} of them a shared system prompt; steps 0 to {prompts['steps']}.",
        f"Over all of {len(report['turns'])} turns (least to most). Cold: start-up and {prompts['cold']} prompts;",
        f"`{COMPILED}`: with the compiled model on disk.",
        f"headrift's KV cache is held to {utils.KV_BYTES >> 30} GiB, since other engines share the memory.",
        "",
        *utils.markdown(["way", "prompts/s", "times the first", "cold, s", "cold prompts/s", "peak GB"], ways),
        "",
        f"Agreement with `{EAGER}`:",
        "",
        *utils.markdown([*head, "AUROC"], compared),
        "",
        f"Matrix products of the model's shapes reach, by rows, {rates} GFLOP/s at best.",
        *(
            f"{name}: {utils.cell(share, 2)} of the best ({peak['gflop'][name]:.0f} GFLOP computed)."
            for name, share in peak["share"].items()
        ),
    ]


def main() -> None:
    options = utils.parser(__doc__, "peers")
    sets = utils.ROOT
    options.add_argument("--prompts", type=Path, default=sets / "datasets/obfuscated_word.jsonl")
    options.add_argument("--system", type=Path, default=sets / "system_prompts/obfuscated_word.txt")
    options.add_argument("--limit", type=int, help="prompts (100; 12 with --short)")
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--turns", type=int, help="turns of every way, and blocks of the prompts (4; 2 with --short)")
    options.add_argument("--nnsight", type=Path, metavar="PYTHON", help="a Python with nnsight, to measure it too")
    args = options.parse_args()
    n_turns = args.turns or (2 if args.short else 4)
    lines = args.prompts.read_text(encoding="utf-8").splitlines()[: args.limit or (12 if args.short else 100)]
    system = args.system.read_text(encoding="utf-8").strip()
    rows = [{**json.loads(line), "system": system} for line in lines]
    Random(0).shuffle(rows)  # the file has its kinds one after another, and blocks are to be alike
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ[HUGE_PAGES] = "1"  # of this process, which measures the machine's peak
    report = utils.new_report(args)

    from headrift.prepare import load_tokenizer

    prompts, shapes = render(rows, system, args.model), Shapes.read(args.model)
    eos = load_tokenizer(str(args.model), False).eos_token_id
    every = list(range(len(rows)))
    kept: dict[str, dict[str, list]] = {}
    turns, rates = [], []
    with Ways(args, rows, prompts, eos) as ways:
        for name in (EAGER, EAGER_HUGE, BATCHED):
            ways.start(name)
        ways.start(GENERATE)
        ways.answers = ways.run(GENERATE, every)["answers"]
        ways.start(REPLAY)
        if not args.short:  # compiling takes a minute
            ways.compile()
            ways.start(COMPILED)
        if args.nnsight:
            ways.start(NNSIGHT)
        report |= {"not_measured": {PLUGIN: why_no_plugin()}, "cold": ways.cold, "versions_of_peers": ways.versions}
        if not args.nnsight:
            report["not_measured"][NNSIGHT] = "no --nnsight PYTHON was given"
        for turn, block in enumerate(np.array_split(every, n_turns)):
            samples: dict[str, Any] = {}
            for name in ways.names if turn % 2 == 0 else ways.names[::-1]:
                which = block.tolist() if name in SLOW else every
                samples[name] = {**ways.run(name, which), "prompts": len(which)}
                samples[name].pop("answers", None)
                if name in SLOW:
                    _keep(kept.setdefault(name, {"masses": [], "answers": []}), ways.arrays(name), len(which))
            turns.append(samples)
            rates.append(utils.matrix_product_rates(shapes))
            print({name: round(run["prompts"] / run["seconds"], 2) for name, run in samples.items()}, flush=True)
        for name in (name for name in ways.names if name not in SLOW):
            ways.run(name, every, keep=True)
            _keep(kept.setdefault(name, {"masses": [], "answers": []}), ways.arrays(name), len(every))
        names = ways.names
    for way in kept.values():
        way.setdefault("scores", scores_of(way["masses"], way["answers"], args.steps))
    done = {name: tuple([t[name][column] for t in turns] for column in ("prompts", "seconds")) for name in names}
    report |= {
        "prompts": {
            "file": args.prompts.name,
            "n": len(rows),
            "steps": args.steps,
            "cold": min(COLD, len(rows)),
            "mean_tokens": float(np.mean([len(prompt["ids"]) for prompt in prompts])),
            "system_tokens": float(np.mean([end - start for start, end in (p["regions"][0] for p in prompts)])),
        },
        "turns": turns,
        "ways": {
            name: {
                "prompts_per_second": utils.over_all(*done[name]),
                "ratio": _ratio(done[name], done[EAGER]),
                "cold": report["cold"][name],
                # Of generating and replaying alone: the runs that hand out masses come after the turns.
                "peak_bytes": turns[-1][name]["peak_bytes"],
            }
            for name in names
        },
        "agreement": {name: agreement(kept[name], kept[EAGER], rows, args.steps) for name in names if name != EAGER},
        "peak": peak_report(turns, rates),
    }
    utils.write(report, table(report), utils.out_path(args))


def _keep(into: dict[str, list], arrays: dict[str, np.ndarray], n: int) -> None:
    """Add a run's masses, answers and, if it has them, scores."""
    into["masses"] += [arrays[f"m{i}"] for i in range(n)]
    into["answers"] += [arrays[f"a{i}"].tolist() for i in range(n)]
    if "s0" in arrays:  # headrift's own; of the others they are worked out from the masses
        into["scores"] = [None if np.isnan(arrays[f"s{i}"]) else float(arrays[f"s{i}"]) for i in range(n)]


def _ratio(ours: tuple[list[float], ...], theirs: tuple[list[float], ...]) -> dict[str, float]:
    """Of two ways' prompts and seconds by turn: the ratio of their rates over all, and the least and most of a turn."""
    rates = [[n / seconds for n, seconds in zip(*way)] for way in (ours, theirs)]
    each = [a / b for a, b in zip(*rates)]
    over_all = [utils.over_all(*way)["all"] for way in (ours, theirs)]
    return {"all": over_all[0] / over_all[1], "low": min(each), "high": max(each)}


def peak_report(turns: list[dict[str, Any]], rates: list[dict[str, Any]]) -> dict[str, Any]:
    """headrift's FLOPs of each turn over its time, over the best matrix product measured in the same turn."""
    share = {
        name: utils.spread(
            [1e-9 * t[name]["flops"] / t[name]["seconds"] / r["peak_gflops"] for t, r in zip(turns, rates)]
        )
        for name in turns[0]
        if name not in SLOW
    }
    best = max(rates, key=lambda rate: rate["peak_gflops"])
    return {
        "rates": best,
        "peak_gflops": [rate["peak_gflops"] for rate in rates],
        "gflop": {name: 1e-9 * turns[0][name]["flops"] for name in share},
        "share": share,
    }


if __name__ == "__main__":
    utils.run_script(main, headrift=Scored, transformers=Eager, nnsight=Traced)
