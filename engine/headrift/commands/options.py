"""Command-line options that more than one command has, each defined once, and groups of them that become configs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from headrift.terminal import Reporter

RESUMABLE = """\b
Exit codes:
  0    done
  1    interrupted or failed: rerun with --resume
  2    bad option or input; nothing was started
  130  stopped by Ctrl-C: rerun with --resume
"""
NOT_RESUMABLE = """\b
Exit codes:
  0    done
  1    failed, or the result could not be written
  2    bad option or input; nothing was written
  130  stopped by Ctrl-C
"""

Model = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the model.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="New or empty folder for the results.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out; use the same options.")]
JsonOut = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write all numbers to this JSON file.")]
RUNS = typer.Argument(metavar="RUN", help="Folders that `headrift score` wrote, of one model.")
DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(metavar="TYPE", help="float32, bfloat16 or float16; auto: what suits the machine."),
]
Labels = Annotated[
    str | None, typer.Option(metavar="A,B", help="A label for each INPUT, attack or benign, for rows without one.")
]
SystemPromptFile = Annotated[Path | None, typer.Option(metavar="FILE", help="System prompt for rows without one.")]
Column = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=NAME", help="Name of a key or column in the inputs, as in prompt=text. Repeatable."),
]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="Use only the first N inputs.")]
Calibration = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File that `headrift calibrate` wrote: use its window, layers and threshold."),
]
CalibrationAnyway = Annotated[
    bool,
    typer.Option(
        "--calibration-anyway", help="Use the calibration although it is for another model, type or chat template."
    ),
]
FailTerm = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TERM",
        help="Words that show an attack succeeded: whole words in any case, or re:PATTERN (a regular expression). "
        "Repeatable.",
    ),
]
Resamples = Annotated[int, typer.Option(metavar="N", min=0, help="Bootstrap resamples; 0: no intervals.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of all random draws.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print tracebacks and vLLM's log.")]


def parse_pair(text: str, option: str, form: str, example: str) -> tuple[str, str]:
    """Split what an option of the form KEY=... gives; ValueError, with the example, if it is something else."""
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise ValueError(f"{option} {text} is not {form}, as in {example}")
    return key, value


def parse_columns(column: list[str] | None) -> dict[str, str]:
    return dict(parse_pair(text, "--column", "KEY=NAME", "prompt=text") for text in column or ())


def parse_labels(labels: str | None) -> tuple[str, ...] | None:
    return None if labels is None else tuple(label.strip() for label in labels.split(","))


def read_system_prompt(path: Path | None) -> str | None:
    """Read the text of a --system-prompt-file, if one is given; ValueError if it cannot be read or is empty."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"--system-prompt-file {path} is not UTF-8 text: convert it to UTF-8") from error
    except OSError as error:
        raise ValueError(f"--system-prompt-file {path} cannot be read: {error.strerror}") from error
    if not text:
        raise ValueError(f"--system-prompt-file {path} is empty: there is nothing to measure attention on")
    return text


def check_file_to_write(out: Path) -> None:
    """Raise ValueError if `out` is a folder, or its folder does not exist."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out} is a folder, or its folder does not exist: name a file in an existing folder")


@dataclass(frozen=True)
class Messages:
    """What a command prints on standard error."""

    quiet: Quiet = False
    verbose: Verbose = False

    def reporter(self) -> Reporter:
        return Reporter(self.quiet, self.verbose)

    def exclusive_reporter(self) -> Reporter:
        """The reporter of commands that cannot be both quiet and verbose; exit if both are chosen."""
        if self.quiet and self.verbose:
            with Reporter().errors(2):
                raise ValueError("--quiet and --verbose contradict each other: choose one")
        return self.reporter()


@dataclass(frozen=True)
class EngineOptions:
    """How an engine computes."""

    dtype: DType = "auto"
    attention_backend: Annotated[
        Literal["auto", "cpu", "triton", "flash"],
        typer.Option(
            metavar="NAME",
            help="flash (FlashAttention) or triton on a GPU, cpu on a CPU; auto: the first that supports the model.",
        ),
    ] = "auto"

    def config(self) -> dict[str, Any]:
        """These options as fields of a job's config."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class CorpusEngineOptions(EngineOptions):
    """How the engine, or the engines of a cluster, compute whole corpora."""

    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="On a CPU, use torch.compile. Seldom faster: try it before a long job. The first start takes a minute "
            "longer, later ones some seconds. (On a GPU vLLM compiles anyway.)",
        ),
    ] = False
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(metavar="NAME", help="local: one engine on this machine; ray: engines on a Ray cluster."),
    ] = "local"
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --engine ray: number of engines (default: one per GPU, or one per machine without GPUs).",
        ),
    ] = None


@dataclass(frozen=True)
class CorpusOptions:
    """Which rows of which inputs are scored into which folder."""

    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help=".txt (a prompt a line, # comments), .jsonl (an object a line), .csv or .parquet files, also .gz and "
            ".zst; globs, folders and URLs (s3://...) of such. Keys or columns: prompt and system, or messages and "
            "tools, or token_ids and regions; id, label, category, response.",
        ),
    ]
    model: Model
    out: Out
    resume: Resume = False
    labels: Labels = None
    system_prompt_file: SystemPromptFile = None
    region: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A region that rows with token ids name, besides system, user, tool and bos. Repeatable.",
        ),
    ] = None
    column: Column = None
    redact: Annotated[
        bool, typer.Option("--redact", help="Write no prompt, answer or system prompt to any output.")
    ] = False
    limit: Limit = None
    sample: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use N rows, drawn from the whole input.")] = (
        None
    )
    seed: Seed = 0
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Use every N-th row from the I-th on: N such runs have each row once."),
    ] = None

    def config(self) -> dict[str, Any]:
        """These options, except --resume, as fields of a job's config; ValueError if one is malformed."""
        from headrift.corpus.config import Selection, parse_shard

        shard = None if self.shard is None else parse_shard(self.shard)
        return {
            "inputs": tuple(self.inputs),
            "model": self.model,
            "out": self.out,
            "labels": parse_labels(self.labels),
            "system_prompt": read_system_prompt(self.system_prompt_file),
            "regions": tuple(self.region or ()),
            "columns": parse_columns(self.column),
            "redact": self.redact,
            "selection": Selection(self.limit, self.sample, self.seed, shard),
        }


def add_commands(app: typer.Typer, *commands: Callable[..., None], exit_codes: str | None = None) -> None:
    """Give an app commands. A parameter whose type is a dataclass becomes an option for each of its fields."""
    for command in commands:
        app.command(epilog=exit_codes)(_flattened(command))


def _flattened(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with the fields of its groups as parameters, the only form that Typer knows."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if is_dataclass(parameter.annotation)
    }
    parameters = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        types = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            option = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default)
            parameters.append(option.replace(annotation=types[field.name]))

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        built = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **built)

    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat
