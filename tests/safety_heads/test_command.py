"""`headrift heads ships`: what is refused, before any model is loaded and with nothing written."""

import pytest
from typer.testing import CliRunner

from headrift.cli import app


@pytest.fixture
def queries(tmp_path):
    file = tmp_path / "queries.txt"
    file.write_text("How are you?\n", encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "30:0"], "it has layers 0 to 29"),
        (["--heads", "0:9"], "query heads 0 to 8"),
        (["--heads", "3"], "'3' is not LAYER:HEAD"),
        (["--heads", "3:1,3:1"], "twice"),
        (["--epsilon", "nan"], "epsilon"),
        (["--epsilon", "small"], "Invalid value for '--epsilon'"),
        (["--kind", "zero"], "undifferentiated"),
        (["--column", "prompt"], "is not KEY=NAME"),
        (["--model", "nowhere"], "--model nowhere"),
    ],
)
def test_refused(queries, demo_model, tmp_path, options, message):
    out = tmp_path / "out"
    command = ["heads", "ships", str(queries), "--model", str(demo_model), "--out", str(out), *options]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not out.exists()


def test_a_folder_with_something_in_it_is_left_alone(queries, demo_model, tmp_path):
    done = CliRunner().invoke(app, ["heads", "ships", str(queries), "--model", str(demo_model), "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "not empty" in done.output


def test_a_query_longer_than_the_context_is_refused(demo_model, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("word " * 9000, encoding="utf-8")
    command = ["heads", "ships", str(file), "--model", str(demo_model), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "context of 8,192" in done.output
