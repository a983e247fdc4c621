"""The command line. Exit codes: 0 done, 1 failed on the way, 2 bad option or input, 130 stopped by Ctrl-C."""

from __future__ import annotations

from typing import Annotated

import typer

from headrift._version import __version__
from headrift.commands.calibrate import calibrate
from headrift.commands.consistency import consistency, evaluate_consistency, train_consistency
from headrift.commands.demo_model import demo_model
from headrift.commands.doctor import doctor, selftest
from headrift.commands.heads import heads
from headrift.commands.internals import internals
from headrift.commands.options import NOT_RESUMABLE, RESUMABLE, add_commands
from headrift.commands.report import report
from headrift.commands.score import explain, gate, score

app = typer.Typer(
    name="headrift",
    help="Score prompts for inter-head attention instability while vLLM answers them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,  # rich's boxes leave the words a third of an 80-column terminal
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"headrift {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Score prompts for inter-head attention instability while vLLM answers them."""


add_commands(app, score, gate, exit_codes=RESUMABLE)
add_commands(app, calibrate, report, explain, exit_codes=NOT_RESUMABLE)
app.add_typer(heads)
add_commands(app, consistency, train_consistency, exit_codes=RESUMABLE)
add_commands(app, evaluate_consistency, exit_codes=NOT_RESUMABLE)
add_commands(app, internals, exit_codes=RESUMABLE)
add_commands(app, selftest, exit_codes=NOT_RESUMABLE)
add_commands(app, doctor, demo_model)


if __name__ == "__main__":
    app()
