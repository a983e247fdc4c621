"""Is it the same number as the slow way, and how much faster: the same prompts by headrift and by what people do now.

    python bench/peers.py [--prompts FILE --system FILE] [--nnsight PYTHON] [--turns 4] [--short]

transformers with eager attention and `output_attentions`, one prompt at a time (also with memory in huge pages, which
headrift asks for) and in batches padded on the left; headrift generating (also compiled, not with --short) and
replaying, which gets the answers that generating gave; and nnsight, one prompt at a time, in a Python of its own
(--nnsight: one with `pip install nnsight==0.8.1`). All are greedy, float32, and record steps 0 to 12 of all heads.

Each way is a process, stopped while another works. In a turn the slow ways take one block of the shuffled prompts,
headrift all prompts, with an empty prefix cache. Rates are all prompts over all seconds. Cold: from the start of the
process until 10 prompts are done. The slow ways get token ids, and OpenMP's own settings; headrift also renders and
tokenises. The peak is the best float32 matrix product of the model's own shapes, measured beside each turn.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from random import Random

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
BATCH, COLD = 16, 10  # prompts
PLUGIN_PACKAGE = "vllm-lens==1.3.0"


class Scored:
    """A Scorer. Results are not taken from earlier ones unless the options say so (`repeat_bytes`)."""

    def start(self, model: str, **options) -> dict:
        from headrift import Scorer

        self._shapes = Shapes.read(Path(model))
        self._scorer = Scorer(model, **{"repeat_bytes": 0, **options})
        self._finished: list = []
        utils.after(self._scorer.engine, "step", self._finished.extend)
        return {}

    def run(self, rows: list[dict], replay: bool = False, keep: bool = False) -> dict:
        """Score the rows, with nothing in the prefix cache; if they are replayed, they have `response_ids`.

        keep: with masses and scores; the masses then leave the device too.
        """
        forget(self._scorer)
        self._scorer.keep_mass = keep
        self._finished.clear()
        with Stopwatch() as clock:
            results = list(self._scorer.score(rows, replay=replay))
        rejected = [result for result in results if not hasattr(result, "shares")]
        if rejected:
            raise ValueError(f"prompts that cannot be scored: {rejected[:3]}")
        kept = {"masses": [result.mass.tolist() for result in results]} if keep else {}
        kept |= {"scores": [result.score for result in results]} if keep else {}
        return {
            "seconds": clock.seconds,
            "cpu_seconds": clock.cpu_seconds,
            "prompt_tokens": sum(result.prompt_tokens for result in results) / len(results),
            "system_tokens": sum(result.system_tokens for result in results) / len(results),
            "answers": [result.answer_ids for result in results],
            "flops": sum(map(self._flops, self._finished)),
            **kept,
        }

    def _flops(self, done) -> int:
        """What the engine computed for a request: no token that came from the cache."""
        fed, logits = len(done.request.prompt_ids) + len(done.answer_ids) - 1, len(done.answer_ids)
        if done.request.answer_ids is not None:
            fed, logits = len(done.request.prompt_ids) + done.n_steps, 1
        tokens = fed - done.cached_tokens
        return self._shapes.flops(tokens, keys_attended(done.cached_tokens, tokens), logits)


def forget(scorer) -> None:
    """Empty a scorer's prefix cache."""
    scorer.engine.llm_engine.reset_prefix_cache()
    scorer._primed.clear()


def start_headrift(model: Path, steps: int, environment: dict[str, str] | None = None, **engine_args) -> Child:
    """Start a Scorer's process."""
    child = Child("peers.py", "headrift", environment=environment)
    settings = {"kv_cache_memory_bytes": utils.KV_BYTES, **engine_args}
    child.call("start", model=str(model), steps=steps, engine_args=settings)
    return child


class Eager:
    """transformers in float32 with eager attention: greedy answers and their masses, prompts in batches."""

    def start(self, model: str, batch: int) -> dict:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._batch = batch
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        self._model.eval()
        return {}

    def run(self, prompts: list[dict], steps: int, eos: int) -> dict:
        """Answer the prompts (`ids`, `regions`): masses [steps, layers, heads, regions] and answers of each."""
        import torch

        done: list[tuple] = []
        with Stopwatch() as clock, torch.inference_mode():
            for first in range(0, len(prompts), self._batch):
                done += self._answer(prompts[first : first + self._batch], steps, eos)
        kept = {"masses": [masses.tolist() for masses, _ in done], "answers": [answer for _, answer in done]}
        return {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds, **kept}

    def _answer(self, prompts: list[dict], steps: int, eos: int) -> list[tuple[np.ndarray, list[int]]]:
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

    def start(self, model: str) -> dict:
        import torch
        from nnsight import LanguageModel

        self._batch = 1
        self._model = LanguageModel(model, dtype=torch.float32, attn_implementation="eager", dispatch=True)
        return {"versions": {name: version(name) for name in ("nnsight", "torch", "transformers")}}

    def _answer(self, prompts: list[dict], steps: int, eos: int) -> list[tuple[np.ndarray, list[int]]]:
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


def render(rows: list[dict], tokenizer) -> list[dict]:
    """Return the rows as token ids with the regions' ranges, as headrift renders them."""
    from headrift.prompts import ChatRenderer, chat_messages

    renderer = ChatRenderer(tokenizer)
    prompts = [renderer.render(chat_messages(row["prompt"], row["system"])) for row in rows]
    return [{"ids": p.token_ids, "regions": [p.regions[name] for name in REGIONS]} for p in prompts]


def why_no_plugin() -> str:
    """Return what pip says when it is to install the vLLM plugin that records attention."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--target", folder, PLUGIN_PACKAGE]
        done = subprocess.run(["timeout", "120", *command], capture_output=True, text=True)
    if not done.returncode:
        return f"{PLUGIN_PACKAGE} can be installed here, but this script does not drive it"
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return f"pip install {PLUGIN_PACKAGE}: {' '.join(errors) or done.stderr.strip()[-300:] or 'no answer in 120 s'}"


class Ways(ExitStack):
    """The processes, started one after another, each with its cold run."""

    def __init__(self, args, rows: list[dict], prompts: list[dict], eos: int):
        super().__init__()
        self._args, self._rows, self._prompts, self._eos = args, rows, prompts, eos
        self.children: dict[str, Child] = {}
        self.cold: dict[str, dict[str, float]] = {}
        self.versions: dict[str, str] = {}
        self.answers: list[list[int]] = []

    def start(self, name: str) -> None:
        """Start a way and have it do its first prompts."""
        first, begin = min(COLD, len(self._prompts)), time.perf_counter()
        self.children[name] = self.enter_context(self.process(name))
        started = time.perf_counter() - begin
        self.run(name, list(range(first)))
        seconds = time.perf_counter() - begin
        self.cold[name] = {"prompts": first, "start_s": started, "seconds": seconds}
        print(f"{name}: started in {started:.1f} s, {first} prompts {seconds:.1f} s", flush=True)

    def process(self, name: str) -> Child:
        if name not in SLOW:
            engine_args = {"enforce_eager": False} if name == COMPILED else {}
            return start_headrift(self._args.model, self._args.steps, **engine_args)
        # As they come: headrift's settings of OpenMP are headrift's.
        environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
        environment[HUGE_PAGES] = "1" if name == EAGER_HUGE else "0"
        kind, python = ("nnsight", self._args.nnsight) if name == NNSIGHT else ("transformers", sys.executable)
        child = Child("peers.py", kind, environment=environment, python=python)
        options = {} if name == NNSIGHT else {"batch": BATCH if name == BATCHED else 1}
        self.versions |= child.call("start", model=str(self._args.model), **options).get("versions", {})
        return child

    def run(self, name: str, which: list[int], *, keep: bool = False) -> dict:
        """Have a way do these prompts. keep: headrift hands out its masses too (the others always do)."""
        if name in SLOW:
            prompts = [self._prompts[i] for i in which]
            return self.children[name].call("run", prompts=prompts, steps=self._args.steps, eos=self._eos)
        rows = [self._rows[i] for i in which]
        if name == REPLAY:
            rows = [{**row, "response_ids": self.answers[i]} for i, row in zip(which, rows)]
        return self.children[name].call("run", rows=rows, replay=name == REPLAY, keep=keep)


def move(run: dict, kept: dict[str, list]) -> None:
    """Move what a run hands out to what is kept: masses, answers and, if headrift worked them out, scores."""
    for name in ("masses", "answers", "scores"):
        values = run.pop(name, [])
        kept[name] += [np.array(mass, np.float32) for mass in values] if name == "masses" else values


def agreement(ours: dict[str, list], expected: dict[str, list], rows: list[dict], steps: int) -> dict:
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

    window, system, prompt = signal.Window(1, steps), REGIONS.index("system"), REGIONS.index("prompt")
    scores = []
    for mass, answer in zip(masses, answers):
        instability = signal.instability(signal.share(mass[..., system], mass[..., prompt]))
        scores.append(signal.score(instability, window, n_steps=signal.n_steps(len(answer), steps)).value)
    return scores


def table(report: dict) -> str:
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
    shares = [
        f"\n{name}: {utils.cell(share, 2)} of the best ({peak['gflop'][name]:.0f} GFLOP computed)."
        for name, share in peak["share"].items()
    ]
    return utils.page(
        utils.title(report, "headrift and other ways to the same numbers"),
        f"Made by `bench/peers.py`: {prompts['n']} prompts of {prompts['file']}, {prompts['mean_tokens']:.0f} tokens\n"
        f"in the mean, {prompts['system_tokens']:.0f} of them a shared system prompt; steps 0 to {prompts['steps']}.\n"
        f"Over all of {len(report['turns'])} turns (least to most). Cold: start-up and {prompts['cold']} prompts;\n"
        f"`{COMPILED}`: with the compiled model on disk.\n"
        f"headrift's KV cache is held to {utils.KV_BYTES >> 30} GiB, since other engines share the memory.",
        utils.markdown(["way", "prompts/s", "times the first", "cold, s", "cold prompts/s", "peak GB"], ways),
        f"Agreement with `{EAGER}`:",
        utils.markdown([*head, "AUROC"], compared),
        f"Matrix products of the model's shapes reach, by rows, {rates} GFLOP/s at best.{''.join(shares)}",
    )


def main() -> None:
    options = utils.Options(__doc__, "peers")
    options.prompts()
    options.amount("limit", 100, 12, "prompts")
    options.add_argument("--steps", type=int, default=12)
    options.amount("turns", 4, 2, "turns of every way, and blocks of the prompts")
    options.add_argument("--nnsight", type=Path, metavar="PYTHON", help="a Python with nnsight, to measure it too")
    args = options.parse()
    rows = utils.read_prompts(args.prompts, args.system, args.limit)
    Random(0).shuffle(rows)  # the file has its kinds one after another, and blocks are to be alike
    os.environ[HUGE_PAGES] = "1"  # of this process, which measures the machine's peak
    report = utils.new_report(args)

    from headrift.prepare import load_tokenizer

    tokenizer, shapes = load_tokenizer(str(args.model), False), Shapes.read(args.model)
    prompts, every = render(rows, tokenizer), list(range(len(rows)))
    kept: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    turns, rates = [], []
    with Ways(args, rows, prompts, tokenizer.eos_token_id) as ways:
        for name in (EAGER, EAGER_HUGE, BATCHED, GENERATE):
            ways.start(name)
        ways.answers = ways.run(GENERATE, every)["answers"]
        ways.start(REPLAY)
        if not args.short:  # compiling takes a minute: what is timed is a start that finds it done
            with ways.process(COMPILED):
                pass
            ways.start(COMPILED)
        if args.nnsight:
            ways.start(NNSIGHT)
        not_measured = {} if args.nnsight else {NNSIGHT: "no --nnsight PYTHON was given"}
        report |= {"not_measured": {PLUGIN: why_no_plugin(), **not_measured}, "cold": ways.cold}
        report["versions_of_peers"] = ways.versions
        for block, order in zip(np.array_split(every, args.turns), utils.orders(list(ways.children), args.turns)):
            samples = {}
            for name in order:
                which = block.tolist() if name in SLOW else every
                samples[name] = {**ways.run(name, which), "prompts": len(which)}
                move(samples[name], kept[name] if name in SLOW else defaultdict(list))
            turns.append(samples)
            rates.append(matrix_product_rates(shapes))
            print({name: round(run["prompts"] / run["seconds"], 2) for name, run in samples.items()}, flush=True)
        names = list(ways.children)
        for name in names:
            if name not in SLOW:
                move(ways.run(name, every, keep=True), kept[name])
    for way in kept.values():
        way["scores"] = way["scores"] or scores_of(way["masses"], way["answers"], args.steps)
    done = {name: tuple([t[name][column] for t in turns] for column in ("prompts", "seconds")) for name in names}
    report |= {
        "prompts": {
            "file": args.prompts.name,
            "n": len(rows),
            "steps": args.steps,
            "cold": min(COLD, len(rows)),
            "mean_tokens": float(np.mean([len(prompt["ids"]) for prompt in prompts])),
            "system_tokens": float(np.mean([np.diff(prompt["regions"][0]) for prompt in prompts])),
        },
        "turns": turns,
        "ways": {
            name: {
                "prompts_per_second": utils.over_all(*done[name]),
                "ratio": ratio(done[name], done[EAGER]),
                "cold": report["cold"][name],
                # Of generating and replaying alone: the runs that hand out masses come after the turns.
                "peak_bytes": turns[-1][name]["peak_bytes"],
            }
            for name in names
        },
        "agreement": {name: agreement(kept[name], kept[EAGER], rows, args.steps) for name in names if name != EAGER},
        "peak": peak_report(turns, rates),
    }
    utils.write(report, table(report), args.out)


def ratio(ours: tuple[list[float], ...], theirs: tuple[list[float], ...]) -> dict[str, float]:
    """Of two ways' prompts and seconds by turn: the ratio of their rates over all, and the least and most of a turn."""
    each = np.divide(*ours) / np.divide(*theirs)
    over_all = [utils.over_all(*way)["all"] for way in (ours, theirs)]
    return {"all": over_all[0] / over_all[1], "low": float(each.min()), "high": float(each.max())}


def matrix_product_rates(shapes: Shapes) -> dict:
    """Measure float32 products of a model's shapes: GFLOP/s by rows and product, and the best of all as the peak."""
    import torch

    rates: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for rows in (8, 64, 512, 2048):
            rates[str(rows)] = {}
            for name, (inputs, outputs) in shapes.matrices.items():
                values, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
                torch.nn.functional.linear(values, weight)
                n, start = 0, time.perf_counter()
                while (seconds := time.perf_counter() - start) < 0.15 or n < 2:
                    torch.nn.functional.linear(values, weight)
                    n += 1
                rates[str(rows)][name] = 2e-9 * n * rows * inputs * outputs / seconds
    return {"gflops": rates, "peak_gflops": max(max(by_product.values()) for by_product in rates.values())}


def peak_report(turns: list[dict], rates: list[dict]) -> dict:
    """headrift's FLOPs of each turn over its time, over the best matrix product measured in the same turn."""

    def share(name: str) -> list[float]:
        runs = [turn[name] for turn in turns]
        return [1e-9 * run["flops"] / run["seconds"] / r["peak_gflops"] for run, r in zip(runs, rates)]

    names = [name for name in turns[0] if name not in SLOW]
    return {
        "rates": max(rates, key=lambda rate: rate["peak_gflops"]),
        "peak_gflops": [rate["peak_gflops"] for rate in rates],
        "gflop": {name: 1e-9 * turns[0][name]["flops"] for name in names},
        "share": {name: utils.spread(share(name)) for name in names},
    }


if __name__ == "__main__":
    utils.run_script(main, headrift=Scored, transformers=Eager, nnsight=Traced)
