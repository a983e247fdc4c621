"""What the commands share: options, notes and errors on standard error."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


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
        help="flash (FlashAttention) or triton on a GPU, cpu on a CPU; auto: the first that can attend.",
    ),
]
Model = Annotated[Path, typer.Option(metavar="DIR", help="The model's folder.", show_default=False)]
DTypeOption = Annotated[
    DType, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16; auto suits the machine.")
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the results.", show_default=False)]
Column = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=NAME", help="What the inputs call a key. Repeatable.", show_default=False),
]
SystemPromptFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="System prompt of rows that bring none.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is in the folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Let vLLM log, and show where errors arose.")]


def column_of(given: str) -> tuple[str, str]:
    """A --column as key and name. ValueError where it is none."""
    key, equals, name = given.partition("=")
    if not equals or not key or not name:
        raise ValueError(f"--column {given} is not KEY=NAME, as in prompt=text")
    return key, name


def system_prompt_of(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"--system-prompt-file {path} is not UTF-8 text: convert it to UTF-8") from error
    except OSError as error:
        raise ValueError(f"--system-prompt-file {path} cannot be read: {error.strerror}") from error
    if not text:
        raise ValueError(f"--system-prompt-file {path} is empty: there is nothing to measure attention on")
    return text


def say(text: str, quiet: bool) -> None:
    if not quiet:
        typer.echo(text, err=True)


@contextmanager
def errors(code: int, verbose: bool = False, kept: Callable[[], str] | None = None) -> Iterator[None]:
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
