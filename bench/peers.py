"""Is it the same number as the slow way, and how much faster: the same prompts by headrift and by what people do now.

    python bench/peers.py [--prompts FILE --system FILE] [--nnsight PYTHON] [--turns 4] [--short]

The ways: transformers with eager attention and `output_attentions`, one prompt at a time (what headrift replaces; once
more with torch's memory in huge pages, which headrift asks for) and in batches padded on the left; headrift generating
(as it comes, and not with --short as `headrift score --compile` has it) and replaying, which gets the answers that
generate gave; and nnsight, one prompt at a time, in a Python of its own (--nnsight: one with `pip install
nnsight==0.8.1`). All are greedy, float32, and record the masses of steps 0 to 12 of all heads.

Each way is a process, stopped while another works. A turn is a block of the prompts, shuffled once, for the slow ways,
which so do all prompts once in all turns, and all prompts for headrift, whose prefix cache is emptied before each turn.
Rates are all prompts over all seconds. Cold: from the start of the process until 10 prompts are done. The slow ways are
given token ids, and OpenMP's own settings; headrift renders and tokenises in the time that is counted.
The machine's peak is the best float32 matrix product of the model's own shapes, measured beside each turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _measure
from _children import Child
from _model_math import Shapes
from _peak import matrix_product_rates

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
_PIP_SECONDS = 120


def rendered(rows: list[dict[str, Any]], system: str, model: Path) -> list[dict[str, Any]]:
    """The rows as token ids with the regions' ranges, as headrift renders them."""
    from headrift.preparing import load_tokenizer
    from headrift.prompts import ChatRenderer, chat_messages

    renderer = ChatRenderer(load_tokenizer(str(model), False))
    prompts = [renderer.render(chat_messages(row["prompt"], system)) for row in rows]
    return [{"ids": p.token_ids, "regions": [p.regions[name] for name in REGIONS]} for p in prompts]


def why_no_plugin() -> str:
    """What pip says when it is to install the vLLM plugin that records attention."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--target", folder, PLUGIN_PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS)
        except subprocess.TimeoutExpired:
            return f"pip had not found out in {_PIP_SECONDS} s whether {PLUGIN_PACKAGE} can be installed"
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    if done.returncode:
        return f"pip install {PLUGIN_PACKAGE}: {' '.join(errors) or done.stderr.strip()[-300:]}"
    return f"{PLUGIN_PACKAGE} can be installed here, but this script does not drive it"


class Ways:
    """The processes, started one after another, each with its cold run."""

    def __init__(self, args: Namespace, rows: list[dict[str, Any]], prompts: list[dict[str, Any]], eos: int):
        self._args, self._rows, self._prompts, self._eos = args, rows, prompts, eos
        self._open = ExitStack()
        self._folder = Path(self._open.enter_context(tempfile.TemporaryDirectory()))
        self._children: dict[str, Child] = {}
        self.cold: dict[str, dict[str, float]] = {}
        self.versions: dict[str, str] = {}
        self.answers: list[list[int]] = []

    def __enter__(self) -> Ways:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

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
            child = Child("_peer_transformers.py", environment=environment)
            options = {"batch": BATCH if name == BATCHED else 1}
        elif name == NNSIGHT:
            child, options = Child("_peer_nnsight.py", environment=environment, python=self._args.nnsight), {}
        else:
            child, options = Child("_peer_headrift.py"), self._headrift(name)
        self._children[name] = self._open.enter_context(child)
        about = child.ask("start", model=model, **options)
        self.versions |= about.get("versions", {})
        started = child.seconds_since_start
        self.run(name, list(first))
        self.cold[name] = {"prompts": len(first), "start_s": started, "seconds": child.seconds_since_start}
        print(f"{name}: started in {started:.1f} s, {len(first)} prompts {child.seconds_since_start:.1f} s", flush=True)

    def compile(self) -> None:
        """Have torch.compile compile the model, where it has not yet: what is timed is a start that finds it done."""
        with Child("_peer_headrift.py") as child:
            child.ask("start", model=str(self._args.model), **self._headrift(COMPILED))

    def _headrift(self, name: str) -> dict[str, Any]:
        """What headrift is started with for this way."""
        settings = {"kv_cache_memory_bytes": _measure.KV_BYTES}
        settings |= {"enforce_eager": False} if name == COMPILED else {}
        return {"steps": self._args.steps, "engine_args": settings}

    def run(self, name: str, which: list[int], *, keep: bool = False) -> dict[str, Any]:
        """Have a way do these prompts. keep: headrift hands out its masses too (the others always do)."""
        child, out = self._children[name], str(self._file(name))
        if name in SLOW:
            prompts = [self._prompts[i] for i in which]
            return child.ask("run", prompts=prompts, steps=self._args.steps, eos=self._eos, out=out)
        rows = [self._rows[i] for i in which]
        if name == REPLAY:
            rows = [{**row, "response_ids": self.answers[i]} for i, row in zip(which, rows)]
        return child.ask("run", rows=rows, replay=name == REPLAY, out=out if keep else None)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """What the way's last run left."""
        with np.load(self._file(name)) as file:
            return dict(file)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name.replace(' ', '-')}.npz"


def agreement(found: dict[str, list], expected: dict[str, list], rows: list[dict], steps: int) -> dict[str, Any]:
    """Of two ways' masses, answers and scores by prompt. Masses are compared up to where the answers part."""
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score

    apart, same = [], 0
    for ours, theirs, answer, other in zip(found["masses"], expected["masses"], found["answers"], expected["answers"]):
        alike = next((i for i, (a, b) in enumerate(zip(answer, other)) if a != b), min(len(answer), len(other)))
        same += answer == other
        n = min(alike + 1, len(ours), len(theirs), steps + 1)
        apart.append(np.abs(ours[:n].astype(np.float64) - theirs[:n]).ravel())
    cells, labels = np.concatenate(apart), [row.get("label") == "attack" for row in rows]
    ranked = [[-1.0 if score is None else score for score in of["scores"]] for of in (found, expected)]
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
    """headrift's score of each prompt, from its masses."""
    from headrift import signal

    window = signal.Window(1, steps)
    system, prompt = REGIONS.index("system"), REGIONS.index("prompt")
    scores = []
    for mass, answer in zip(masses, answers):
        share = signal.share(mass[..., system], mass[..., prompt])
        n = signal.n_steps(len(answer), steps)
        scores.append(signal.score(signal.instability(share), window, n_steps=n).value)
    return scores


def table(report: dict[str, Any]) -> str:
    machine, prompts = report["machine"], report["prompts"]
    lines = [
        f"# headrift and other ways to the same numbers: {machine['cpu']}, {machine['cores']} cores, {report['model']}",
        "",
        f"Made by `bench/peers.py`: {prompts['n']} prompts of {prompts['file']}, {prompts['mean_tokens']:.0f} tokens",
        f"in the mean, {prompts['system_tokens']:.0f} of them a shared system prompt; steps 0 to {prompts['steps']}.",
        f"Over all of {len(report['turns'])} turns (least to most). Cold: start-up and {prompts['cold']} prompts;",
        f"`{COMPILED}`: where the compiled model is on disk.",
        f"headrift's KV cache is held to {_measure.KV_BYTES >> 30} GiB, since other engines are there.",
        "",
        "| way | prompts/s | times the first | cold, s | cold prompts/s | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, way in report["ways"].items():
        cold = way["cold"]
        lines.append(
            f"| {name} | {_measure.figures(way['prompts_per_second'], 2)} | {_measure.figures(way['ratio'], 2)} "
            f"| {cold['seconds']:.1f} | {cold['prompts'] / cold['seconds']:.2f} | {way['peak_bytes'] / 1e9:.2f} |"
        )
    lines += [f"| {name} | not measured: {why} | | | | |" for name, why in report["not_measured"].items()]
    lines += [
        "",
        f"Agreement with `{EAGER}`:",
        "",
        "| way | same answers | masses compared | largest difference | mean difference | rank correlation | AUROC |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in report["agreement"].items():
        auroc = [f"{x:.4f}" if x is not None else "" for x in (found["auroc"], found["auroc_expected"])]
        lines.append(
            f"| {name} | {found['same_answers']} | {found['masses_compared']:,} | {found['largest_difference']:.1e} "
            f"| {found['mean_difference']:.1e} | {found['spearman_of_scores']:.5f} | {auroc[0]} and {auroc[1]} |"
        )
    peak = report["peak"]
    rates = ", ".join(f"{rows}: {max(of.values()):.0f}" for rows, of in peak["rates"]["gflops"].items())
    lines += ["", f"Matrix products of the model's shapes reach, by rows, {rates} GFLOP/s at best."]
    for name, share in peak["share"].items():
        lines.append(f"{name}: {_measure.figures(share, 2)} of the best ({peak['gflop'][name]:.0f} GFLOP computed).")
    return "\n".join([*lines, ""])


def main() -> None:
    options = _measure.parser(__doc__, "peers")
    sets = _measure.ROOT
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
    report: dict[str, Any] = {"machine": _measure.machine(), "versions": _measure.versions(), "model": args.model.name}

    from headrift.preparing import load_tokenizer

    prompts, shapes = rendered(rows, system, args.model), Shapes.of(args.model)
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
            rates.append(matrix_product_rates(shapes))
            print({name: round(of["prompts"] / of["seconds"], 2) for name, of in samples.items()}, flush=True)
        for name in (name for name in ways.names if name not in SLOW):
            ways.run(name, every, keep=True)
            _keep(kept.setdefault(name, {"masses": [], "answers": []}), ways.arrays(name), len(every))
        names = ways.names
    for of in kept.values():
        of.setdefault("scores", scores_of(of["masses"], of["answers"], args.steps))
    done = {name: tuple([t[name][of] for t in turns] for of in ("prompts", "seconds")) for name in names}
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
                "prompts_per_second": _measure.over_all(*done[name]),
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
    _measure.write(report, table(report), _measure.out_of(args))


def _keep(into: dict[str, list], arrays: dict[str, np.ndarray], n: int) -> None:
    into["masses"] += [arrays[f"m{i}"] for i in range(n)]
    into["answers"] += [arrays[f"a{i}"].tolist() for i in range(n)]
    if "s0" in arrays:  # headrift's own; of the others they are worked out from the masses
        into["scores"] = [None if np.isnan(arrays[f"s{i}"]) else float(arrays[f"s{i}"]) for i in range(n)]


def _ratio(ours: tuple[list[float], ...], theirs: tuple[list[float], ...]) -> dict[str, float]:
    """Of two ways' prompts and seconds by turn: the ratio of their rates over all, and the least and most of a turn."""
    rates = [[n / seconds for n, seconds in zip(*of)] for of in (ours, theirs)]
    each = [a / b for a, b in zip(*rates)]
    over_all = [_measure.over_all(*of)["all"] for of in (ours, theirs)]
    return {"all": over_all[0] / over_all[1], "low": min(each), "high": max(each)}


def peak_report(turns: list[dict[str, Any]], rates: list[dict[str, Any]]) -> dict[str, Any]:
    """headrift's FLOPs of each turn over its time, over the best matrix product measured in the same turn."""
    share = {
        name: _measure.spread(
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
    main()
