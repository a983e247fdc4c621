"""How prompts/s change with the work and the settings, and where a job's time goes.

    python bench/scaling.py [--repeats 3] [--short] [--model DIR]

Against the number and length of prompts, their system prompt's length and the requests in flight, with the
demonstration model; against depth and width with tiny random models; and the parts of a whole job's time (see `Job`).
Each engine is a process of its own. Every run begins with an empty prefix cache; its prompts are all different.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from corpus import WORDS, make_tiny_model
from peers import forget, start_headrift
from utils import Child, Stopwatch

STEPS = 12
# Each series' title, its values in full, and with --short.
SERIES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "prompts": ("prompts", (1, 8, 64, 256), (1, 8)),
    "prompt_tokens": ("words of a user (8 prompts)", (16, 64, 256, 512), (16, 64)),
    "system_tokens": ("system prompt's words (16 prompts)", (32, 128, 512, 2048), (32, 128)),
    "in_flight": ("most in flight, max_num_seqs (32 prompts)", (1, 4, 16, 64), (2, 8)),
    "layers": ("layers, random, 256 wide (32 prompts)", (2, 4, 8, 16), (2, 4)),
    "hidden": ("width of 4 random layers (32 prompts)", (128, 256, 512, 1024), (128, 256)),
}
PREFILL, DECODE = "steps with prefill", "steps of decoding"
ATTENTION, MASS = "decode attention with masses", "masses of prompts' last tokens"
TOKENISING, READING, WRITING, DRAIN, SCORES, REST = "tokenising", "reading", "writing", "drain", "scores", "the rest"
PHASES = (READING, TOKENISING, PREFILL, DECODE, ATTENTION, MASS, DRAIN, SCORES, WRITING, REST)


class Clock:
    """Seconds by phase, each without the phases that ran inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = [0.0]

    @contextmanager
    def phase(self, name: Callable[[], str]) -> Iterator[None]:
        """Time a phase; `name` is called at its end."""
        self._inside.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name()] += took - self._inside.pop()
            self._inside[-1] += took

    def wrap(self, owner, method: str, name: str | Callable[..., str]) -> None:
        """Have calls of a method counted as a phase; `name`: its name, or a function of the call's arguments."""
        called = getattr(owner, method)

        def timed(*args, **kwargs):
            with self.phase(lambda: name if isinstance(name, str) else name(*args, **kwargs)):
                return called(*args, **kwargs)

        setattr(owner, method, timed)


class Job:
    """Where a job's wall time goes, in this one process; what is inside another part counts once.

    An engine's step, less the kernel's calls, is PREFILL's if it computed tokens of a prompt, otherwise DECODE's.
    """

    def start(self, model: str, **options) -> dict:
        from headrift import Scorer
        from headrift_kernels.cpu.paged_attention import PagedAttention

        self._clock = clock = Clock()
        self._scorer = scorer = Scorer(model, repeat_bytes=0, prepare_workers=0, **options)
        self._prefilling = False
        clock.wrap(scorer.preparer, "prepare", TOKENISING)
        clock.wrap(scorer.engine, "step", lambda: PREFILL if self._prefilling else DECODE)
        clock.wrap(scorer.engine, "collect", DRAIN)
        clock.wrap(scorer.engine, "recordings", DRAIN)
        clock.wrap(scorer, "_result", SCORES)
        clock.wrap(PagedAttention, "attend", lambda *args, output=None, **more: MASS if output is None else ATTENTION)

        def note(planned) -> None:
            most = max(planned.num_scheduled_tokens.values(), default=0)
            self._prefilling = bool(planned.scheduled_new_reqs) or most > 1

        utils.after(scorer.engine.llm_engine.engine_core.engine_core.scheduler, "schedule", note)
        return {}

    def run(self, file: str) -> dict:
        """Score a file of rows into a part; seconds by phase."""
        from headrift.corpus import readers, sources
        from headrift.runs import parts

        clock, engine = self._clock, self._scorer.engine
        forget(self._scorer)
        clock.seconds.clear()
        taken: list = []

        def prompts() -> Iterator:
            rows = readers.Reader(sources.find([file])).rows()
            while True:
                with clock.phase(lambda: READING):
                    row = next(rows, None)
                if row is None:
                    return
                taken.append(row)
                yield row.prompt

        with tempfile.TemporaryDirectory() as folder, Stopwatch() as all_of_it:
            schema = parts.part_schema((), layers=engine.layers, heads=engine.heads, regions=engine.regions)
            files = parts.ShardFiles(Path(folder), 0, schema)
            for result in self._scorer.score(prompts()):
                with clock.phase(lambda: WRITING):
                    files.add(parts.record(taken[result.index].columns(), result))
            with clock.phase(lambda: WRITING):
                files.publish()
        phases = {name: clock.seconds.get(name, 0.0) for name in PHASES}
        phases[REST] = all_of_it.seconds - sum(phases.values())
        return {"seconds": all_of_it.seconds, "prompts": len(taken), "phases": phases}


def rows(n: int, user: int = 20, system: int = 100, seed: int = 0) -> list[dict[str, str]]:
    """Return n prompts with one system prompt; `user` and `system` are words, about as many tokens."""
    random, words = Random(seed), WORDS.split()
    same = " ".join(random.choices(words, k=system))
    return [{"prompt": f"{i}: {' '.join(random.choices(words, k=user))}", "system": same} for i in range(n)]


@contextmanager
def scorer(model: Path, **engine_args) -> Iterator[tuple[Child, float]]:
    """A Scorer's process, warm; and the seconds that it took to start."""
    with start_headrift(model, STEPS, max_model_len=4096, **engine_args) as child:
        started = child.seconds_since_start
        child.call("run", rows=rows(8, seed=1))
        yield child, started


def point(child: Child, at: int, prompts: list[dict[str, str]], repeats: int) -> dict:
    """Measure prompts/s of these prompts, a few times over."""
    runs = [child.call("run", rows=prompts) for _ in range(repeats)]
    return {
        "at": at,
        "prompts": len(prompts),
        "prompt_tokens": runs[0]["prompt_tokens"],
        "system_tokens": runs[0]["system_tokens"],
        "prompts_per_second": utils.spread([len(prompts) / run["seconds"] for run in runs]),
        "peak_bytes": runs[-1]["peak_bytes"],
        "samples": utils.columns({"": runs}, ("seconds", "cpu_seconds", "flops"))[""],
    }


def measure_series(model: Path, short: bool, repeats: int) -> dict[str, list[dict]]:
    """Return the points of all series."""
    sizes = {name: few if short else values for name, (_, values, few) in SERIES.items()}
    series: dict[str, list] = {name: [] for name in SERIES}
    with scorer(model) as (child, started):
        print(f"{model.name}: started in {started:.1f} s", flush=True)
        makers = {"prompts": rows, "prompt_tokens": lambda n: rows(8, n), "system_tokens": lambda n: rows(16, system=n)}
        for name, make in makers.items():
            series[name] = [point(child, n, make(n), repeats) for n in sizes[name]]

    def alone(name: str, n: int, folder: Path, **engine_args) -> None:
        with scorer(folder, **engine_args) as (child, started):
            series[name].append(point(child, n, rows(32), repeats) | {"start_s": started})

    for n in sizes["in_flight"]:
        alone("in_flight", n, model, max_num_seqs=n)
    for name, shape in (("layers", {"hidden": 256}), ("hidden", {"layers": 4})):
        for n in sizes[name]:
            with tempfile.TemporaryDirectory() as folder:
                alone(name, n, make_tiny_model(Path(folder), model, **shape, **{name: n}))
    return series


def phases(args) -> list[dict]:
    """Measure the seconds of a job by phase."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        prompts = utils.read_prompts(args.prompts, args.system, 12 if args.short else None)
        file.write_text("".join(json.dumps(row) + "\n" for row in prompts))
        with Child("scaling.py", "job") as child:
            options = {"steps": STEPS, "engine_args": {"kv_cache_memory_bytes": utils.KV_BYTES}}
            child.call("start", model=str(args.model), **options)
            return [child.call("run", file=str(file)) for _ in range(1 + args.repeats)][1:]


def table(report: dict) -> str:
    points = [
        [SERIES[series][0], f"{p['at']:,}", f"{p['prompt_tokens']:.0f}", f"{p['system_tokens']:.0f}"]
        + [utils.cell(p["prompts_per_second"], 2), f"{p['start_s']:.1f}" if "start_s" in p else ""]
        + [f"{p['peak_bytes'] / 1e9:.2f}"]
        for series, points in report["series"].items()
        for p in points
    ]
    run = middle(report["phases"])
    parts = [[name, f"{run['phases'][name]:.2f}", f"{run['phases'][name] / run['seconds']:.1%}"] for name in PHASES]
    head = ["what grows", "", "prompt tokens", "of them system", "prompts/s", "start-up, s", "peak GB"]
    return utils.page(
        utils.title(report, "Prompts/s by work and settings"),
        f"Made by `bench/scaling.py`, {STEPS} steps; medians of {report['repeats']} runs (least to most). If nothing\n"
        "else is said, a prompt has 20 words and a system prompt of 100 words, shared by all.",
        utils.markdown(head, points),
        f"Where the {run['seconds']:.1f} s of a job of {run['prompts']} prompts go:",
        utils.markdown(["", "s", ""], parts),
    )


def middle(runs: list[dict]) -> dict:
    """The run of median length."""
    return sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]


def plot(report: dict, path: Path) -> None:
    from headrift.figures import new_figure, save

    figure = new_figure(14, 6.5)
    places = figure.add_gridspec(2, 4, width_ratios=(1, 1, 1, 0.45))
    for i, (series, points) in enumerate(report["series"].items()):
        axis, at = figure.add_subplot(places[i // 3, i % 3]), [p["at"] for p in points]
        rates = {name: [p["prompts_per_second"][name] for p in points] for name in ("median", "low", "high")}
        axis.plot(at, rates["median"], marker="o", color="tab:blue")
        axis.fill_between(at, rates["low"], rates["high"], color="tab:blue", alpha=0.2, linewidth=0)
        axis.set(xscale="log", xlabel=SERIES[series][0], ylabel="prompts/s", ylim=(0, None))
        axis.set_xticks(at, [f"{n:,}" for n in at])
        axis.minorticks_off()
    bar, run, bottom = figure.add_subplot(places[:, 3]), middle(report["phases"]), 0.0
    for i, name in enumerate(PHASES):
        share = 100 * run["phases"][name] / run["seconds"]
        bar.bar(0, share, bottom=bottom, color=f"C{i}", label=f"{name} {share:.1f}%")
        bottom += share
    bar.set(xticks=[], ylabel="% of the time", ylim=(0, 100), title=f"a job of {run['prompts']} prompts")
    bar.legend(reverse=True, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
    save(figure, path)


def main() -> None:
    options = utils.Options(__doc__, "scaling")
    options.amount("repeats", 3, 2, "runs of each point")
    options.prompts()
    args = options.parse()
    report = utils.new_report(args, repeats=args.repeats, phases=phases(args))
    report["series"] = measure_series(args.model, args.short, args.repeats)
    utils.write(report, table(report), args.out)
    plot(report, args.out.with_suffix(".png"))


if __name__ == "__main__":
    utils.run_script(main, job=Job)
