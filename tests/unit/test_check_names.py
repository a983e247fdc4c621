"""scripts/check_names.py: which names it finds, and where."""

import pytest

from helpers.scripts import load

check_names = load("scripts/check_names")


def names_in(tmp_path, code, file="module.py"):
    (tmp_path / file).write_text(code)
    return [(line, name) for line, name, _ in check_names.check_file(tmp_path / file)]


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("found = 1", "found"),
        ("def f(asked): ...", "asked"),
        ("def unwritten_steps(): ...", "unwritten_steps"),
        ("class Settings: ...", "Settings"),
        ("class StrawEngine: ...", "StrawEngine"),
        ("import json as of", "of"),
        ("self._tenants = {}", "_tenants"),
        ("for holds in (): ...", "holds"),
        ("f = lambda said: 0", "said"),
        ("[of for of in ()]", "of"),
        ("match x:\n    case {'a': mine}: ...", "mine"),
        ("try: ...\nexcept OSError as there: ...", "there"),
    ],
)
def test_a_word_of_the_lists_is_found_wherever_it_is_bound(tmp_path, code, name):
    assert [bound for _, bound in names_in(tmp_path, code)] == [name]


@pytest.mark.parametrize(
    "code",
    [
        "x = {'found': 1}['found']",
        "f(asked=1)",
        "foundation = offset = holder = 1",
        "class ScoreSettings: ...",
        "def test_a_tenant_is_told(): ...",
        "from headrift import signal",
    ],
)
def test_strings_other_words_and_names_of_tests_are_fine(tmp_path, code):
    assert names_in(tmp_path, code) == []


def test_a_module_is_found_by_its_file(tmp_path):
    assert names_in(tmp_path, "", "waiting.py") == [(1, "waiting.py")]
    assert names_in(tmp_path, "", "test_rubbish.py") == [(1, "test_rubbish.py")]


def test_it_prints_places_and_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.py").write_text("x = 1\nfound = 2\n")
    monkeypatch.setattr("sys.argv", ["check_names.py", str(tmp_path)])
    assert check_names.main() == 1
    assert f"{tmp_path}/a.py:2: found -> " in capsys.readouterr().out
    (tmp_path / "a.py").write_text("x = 1\n")
    assert check_names.main() == 0
