"""Every command in README.md and docs/ is one that headrift, make, pip or Ray takes.

**Read, by the parsers that would read it:** every `headrift ...`, with its subcommand, options, values and arguments,
by Typer; those in sentences by their names and options. Every `make ...`, by make (a dry run); every `ray ...`, by
Ray's own parser. Of `pip install headrift[...]` the extras, of `python FILE` that there is such a file. Python in
the pages is compiled, and what it imports is imported.

**Run, as they stand in the README and in its order, in one folder:** score (with a real engine, and a random model of
two layers in place of the demonstration model), explain, calibrate, report and doctor; slow: score with the
calibration, gate and selftest. What the README leaves out (`...`, ID, MODEL) is put in by the test.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer
from markdown_it import MarkdownIt

from headrift.cli import app

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MODEL = "models/smollm2-135m-instruct"
TOP = typer.main.get_command(app)


def command_of(words: list[str]) -> tuple[typer.core.TyperCommand, list[str]]:
    """The command that the words name, and the words after its name."""
    command, rest = TOP, words[1:]
    while (commands := getattr(command, "commands", None)) and rest and not rest[0].startswith("-"):
        assert rest[0] in commands, f"there is no command '{rest[0]}'"
        command, rest = commands[rest[0]], rest[1:]
    return command, rest


def parse(words: list[str], more: bool) -> None:
    """Let Typer read the words. more: missing options belong to the part that is left out."""
    command, rest = command_of(words)
    if hasattr(command, "commands") and not rest:
        return
    put_in = set()
    while True:
        try:
            command.make_context(" ".join(words), [*rest])
            return
        except typer.Exit:
            return
        except Exception as error:  # Typer's own; what is missing, or wrong, is its `param`
            param = getattr(error, "param", None)
            if not more or param is None or param.name in put_in:
                raise AssertionError(f"{type(error).__name__}: {error}") from None
            put_in.add(param.name)
            rest += ["x"] if param.param_type_name == "argument" else [param.opts[0], "x"]


def commands_named(shown, name: str, block: bool | None = None):
    commands = [each for each in shown if each.words[0] == name and block in (None, each.block)]
    assert commands, f"no page shows a `{name}` command: does this test still find them?"
    return commands


def failures(shown, check) -> list[str]:
    failed = []
    for each in shown:
        try:
            check(each)
        except Exception as error:
            failed.append(f"{each.place}\n    {error}")
    return failed


def test_headrift_commands_are_read_as_they_stand(shown):
    commands = commands_named(shown, "headrift", block=True)
    assert not (wrong := failures(commands, lambda each: parse(each.words, each.open))), "\n".join(wrong)


def test_headrift_commands_in_sentences_name_what_there_is(shown):
    def check(each):
        command, rest = command_of(each.words)
        known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
        for word in rest:
            assert not word.startswith("-") or word.partition("=")[0] in known, f"there is no option {word}"

    assert not (wrong := failures(commands_named(shown, "headrift", block=False), check)), "\n".join(wrong)


@pytest.mark.parametrize(
    "words",
    [
        "headrift nonsense",
        "headrift score a.txt --model m --out o --nonsense",
        "headrift score a.txt --model m",
        "headrift score a.txt --model m --out o --limit many",
        "headrift heads nonsense a.txt",
    ],
)
def test_a_wrong_command_would_be_noticed(words):
    with pytest.raises(AssertionError):
        parse(words.split(), more=False)


def test_every_command_is_shown_somewhere(shown):
    def names(command, before=""):
        for name, sub in getattr(command, "commands", {}).items():
            yield from names(sub, f"{before}{name} ") if hasattr(sub, "commands") else [f"{before}{name}"]

    texts = [" ".join(each.words[1:]) + " " for each in commands_named(shown, "headrift")]
    missing = [name for name in names(TOP) if not any(text.startswith(f"{name} ") for text in texts)]
    assert missing == []


def test_make_has_the_targets(shown):
    def check(each):
        done = subprocess.run(["make", "-n", *each.words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    assert not (wrong := failures(commands_named(shown, "make"), check)), "\n".join(wrong)


def test_pip_installs_extras_that_there_are(shown):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"\[([\w,]+)\]", " ".join(each.text for each in commands_named(shown, "pip")))
    assert named
    assert {extra for names in named for extra in names.split(",")} <= set(extras)


def test_scripts_are_there(shown):
    assert not [each.place for each in commands_named(shown, "python") if not (ROOT / each.words[1]).is_file()]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_ray_takes_its_commands(shown):
    from ray.scripts.scripts import cli

    def check(each):
        cli.commands[each.words[1]].make_context("ray", each.words[2:])

    assert not (wrong := failures(commands_named(shown, "ray"), check)), "\n".join(wrong)


def test_python_in_the_pages_imports_what_there_is():
    blocks = 0
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]:
        for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
            if token.type != "fence" or token.info != "python":
                continue
            blocks += 1
            for node in ast.walk(ast.parse(token.content, str(page))):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, name.name) for name in node.names), f"{page.name}: {ast.unparse(node)}"
    assert blocks >= 4


# ------------------------------------------------------------------------------------------ the README's, run

# Python's own hook, in every process that headrift starts: what looks up a name or connects to another machine, and
# what vLLM is told, when it is imported, about reports of usage (its CPU build sends none either way). A UDP socket
# that is "connected" sends nothing; vLLM learns the machine's own address with one.
WATCH = """
import os, socket, sys
def watch(event, arguments):
    if event == "socket.getaddrinfo":
        what = arguments[0]
    elif event == "import" and arguments[0] == "vllm":
        what = os.environ.get("VLLM_NO_USAGE_STATS")
    elif event == "socket.connect" and arguments[0].family in (socket.AF_INET, socket.AF_INET6):
        if arguments[0].type & socket.SOCK_DGRAM == socket.SOCK_DGRAM:
            return
        what = arguments[1][0]
    else:
        return
    with open(os.environ["WATCHED"], "a") as file:
        print(event, what, file=file)
sys.addaudithook(watch)
print("begun", file=open(os.environ["WATCHED"], "a"))
"""
HERE = {"localhost", "127.0.0.1", "::1", "None", "0.0.0.0", ""}


class Newcomer:
    """A folder in which the README's commands work as they stand, with a tiny model in the place of the real one."""

    def __init__(self, folder: Path, model: Path, commands: list) -> None:
        self.folder, self._commands, self._n_run = folder, commands, 0
        for name in ("datasets", "system_prompts", ".venv"):
            (folder / name).symlink_to(ROOT / name if name != ".venv" else BIN.parent)
        (folder / "models").mkdir()
        (folder / MODEL).symlink_to(model)
        rows = (ROOT / "datasets/banned_word.jsonl").read_text().splitlines(keepends=True)
        (folder / "prompts.jsonl").write_text("".join(rows))
        pq.write_table(pq_table([json.loads(row) for row in rows[:8]]), folder / "log.parquet")
        (folder / "system.txt").write_text((ROOT / "system_prompts/banned_word.txt").read_text())
        (folder / "watch").mkdir()
        (folder / "watch/sitecustomize.py").write_text(WATCH)
        # What `make` sets is not set: these are commands that a user types.
        taken = ("HF_", "TRANSFORMERS_", "VLLM_", "DO_NOT_TRACK")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(taken)}
        self._environment |= {"COLUMNS": "80", "PYTHONPATH": str(folder / "watch"), "WATCHED": str(folder / "watched")}

    def run(self, start: str, **put_in: str) -> str:
        """Run the one block command of the README that begins with `start`, some of its texts replaced; its output."""
        (text,) = [each.text for each in self._commands if each.text.startswith(f".venv/bin/headrift {start}")]
        for old, new in put_in.items():
            assert old in text
            text = text.replace(old, new)
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.folder, env=self._environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout


def pq_table(rows: list[dict]):
    import pyarrow as pa

    return pa.table({name: [row.get(name) for row in rows] for name in ("id", "prompt", "label")})


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory, tiny_model, shown) -> Newcomer:
    """After the README's first three steps: score, and a calibration of that run."""
    commands = [each for each in commands_named(shown, "headrift", block=True) if each.page == ROOT / "README.md"]
    newcomer = Newcomer(tmp_path_factory.mktemp("newcomer"), tiny_model, commands)
    newcomer.scored = newcomer.run("score prompts.jsonl")
    # A random model's heads tell nothing apart, and what is not usable is written only if it is forced.
    newcomer.calibrated = newcomer.run("calibrate run", **{"c.json": "c.json --force"})
    return newcomer


@pytest.mark.nightly
def test_the_readmes_first_command_scores(newcomer):
    assert re.search(r"scored +196", newcomer.scored)
    assert (newcomer.folder / "run/scores.png").is_file()


@pytest.mark.nightly
def test_scoring_contacts_nobody(newcomer):
    lines = (newcomer.folder / "watched").read_text().splitlines()
    assert {line for line in lines if line.startswith("import ")} == {
        "import 1"
    }  # so the hook was in the engine's process
    assert {line for line in lines if line.startswith("socket.") and line.split(" ")[1] not in HERE} == set()


@pytest.mark.nightly
def test_the_readmes_explain_shows_a_row(newcomer):
    assert "score" in newcomer.run("explain run", ID="bw-a-004")


@pytest.mark.nightly
def test_the_readmes_calibrate_sets_a_threshold(newcomer):
    assert f"threshold  {json.loads((newcomer.folder / 'c.json').read_text())['threshold']:.6f}" in newcomer.calibrated


@pytest.mark.nightly
def test_the_readmes_report_is_a_page(newcomer):
    newcomer.run("report run")
    assert "<!doctype html>" in (newcomer.folder / "r.html").read_text()[:100]


@pytest.mark.nightly
def test_the_readmes_doctor_finds_this_machine_ready(newcomer):
    assert "ready: headrift score" in newcomer.run("doctor")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["score log.parquet", "gate prompts.jsonl"])
def test_the_readmes_calibrated_commands(newcomer, start):
    out = start.split()[0] + "-calibrated"
    rest = f"--system-prompt-file system.txt --model {MODEL} --out {out}"
    newcomer.run(start, **{"c.json ...": f"c.json {rest}"})
    rows = pq.read_table(newcomer.folder / out / "part-00000.parquet")
    assert rows.num_rows == (8 if start.startswith("score") else 196)
    assert ("flagged" if start.startswith("score") else "blocked") in rows.column_names


@pytest.mark.slow
def test_the_readmes_selftest_passes(newcomer):
    assert "PASS" in newcomer.run("selftest", MODEL=MODEL)
