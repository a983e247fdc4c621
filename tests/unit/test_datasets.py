"""The prompt sets in datasets/: schema, counts, no two prompts alike, hard benign prompts, lengths that match."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "models" / "smollm2-135m-instruct" / "tokenizer.json"

# A new set: its name (datasets/NAME.jsonl, system_prompts/NAME.txt), what its ids begin with, and a line in the table
# of datasets/README.md.
SETS = {
    "banned_word": "bw",
    "obfuscated_word": "ow",
    "no_digits_urls": "nd",
    "complex_input": "ci",
    "indirect_injection": "ii",
}
# Which have tests of their own, in tests/safety_heads, tests/consistency and tests/internals.
OTHER_SETS = {"safety_topics", "consistency_questions", "internals_prompts"}
LEAST = {"attack": 60, "benign": 120}
HARD = ("hard_topic", "hard_command", "hard_length")
LEAST_OF_A_HARD_KIND = 12
NEAR = 0.9
WINDOW = 10  # as many rows in a row hold both labels

Row = dict[str, Any]


class Text(NamedTuple):
    """What is compared of a row. asked: the user's texts; labelled: for rows given as messages."""

    whole: str
    words: frozenset[str]
    prompt: str
    labelled: str | None


def normalise(text: str) -> str:
    """Lower case; runs of anything but letters and digits become one space. A text of signs only stays what it is."""
    text = text.lower()
    return re.sub(r"[\W_]+", " ", text).strip() or text


def contents(row: Row, roles: tuple[str, ...] = ("user", "assistant", "tool")) -> str:
    """A row's prompt, or the texts of its messages of these roles: not the system text, which rows of a set share."""
    if "prompt" in row:
        return row["prompt"]
    return "\n".join(part["content"] for part in row["messages"] if part["role"] in roles and part.get("content"))


def similarity(one: str, other: str) -> float:
    """The larger of difflib's ratio and the Jaccard overlap of the words, of normalised texts.

    The ratio counts as 0 where a bound of it that is quicker to find is not above NEAR.
    """
    words, others = set(one.split()), set(other.split())
    jaccard = len(words & others) / max(1, len(words | others))
    shorter, longer = sorted((len(one), len(other)))
    if 2 * shorter <= NEAR * (shorter + longer):
        return jaccard
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    return max(jaccard, matcher.ratio() if matcher.quick_ratio() > NEAR else 0.0)


@cache
def read(name: str) -> list[Row]:
    text = (ROOT / "datasets" / f"{name}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert "\n\n" not in text
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


@cache
def texts() -> dict[str, Text]:
    """Of the rows of every set, by id."""
    by_id = {}
    for row in (row for name in SETS for row in read(name)):
        whole = normalise(contents(row))
        prompt = normalise(contents(row, ("user",)))
        by_id[row["id"]] = Text(whole, frozenset(whole.split()), prompt, row["label"] if "messages" in row else None)
    return by_id


def candidates() -> Iterator[tuple[str, str]]:
    """The pairs of ids that may be near-duplicates, by two bounds of similarity() that are quick to find.

    difflib's ratio is at most that of the characters two texts share, in whatever order; the overlap of their words is
    at most that of the numbers of words.
    """
    ids, matches = list(texts()), list(texts().values())
    places = {sign: place for place, sign in enumerate(sorted({sign for text in matches for sign in text.whole}))}
    counts = np.zeros((len(ids), len(places)), np.int32)
    for row, text in zip(counts, matches, strict=True):
        for sign, count in Counter(text.whole).items():
            row[places[sign]] = count
    lengths, words = counts.sum(1), np.array([len(text.words) for text in matches])
    for i, one in enumerate(ids):
        shared = np.minimum(counts[i], counts[i + 1 :]).sum(1)
        by_signs = 2 * shared > NEAR * (lengths[i] + lengths[i + 1 :])
        by_words = np.minimum(words[i], words[i + 1 :]) > NEAR * np.maximum(words[i], words[i + 1 :])
        for j in np.flatnonzero(by_signs | by_words) + i + 1:
            common = len(matches[i].words & matches[j].words)
            if by_signs[j - i - 1] or common > NEAR * (words[i] + words[j] - common):
                yield one, ids[j]


@pytest.fixture(params=SETS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def rows(name: str) -> list[Row]:
    return read(name)


def test_twins_are_a_group() -> None:
    rows = read("indirect_injection")
    twins = {row["id"]: row["group"] for row in rows if "group" in row}
    numbers = [f"{number:03d}" for number in range(1, 61)]
    assert twins == {f"ii-{label}-{number}": f"ii-{number}" for number in numbers for label in "ab"}
    # Prompts of one question are of one group.
    by_question = {}
    for row in rows:
        by_question.setdefault(row["messages"][0]["content"], set()).add(row.get("group", row["id"]))
    assert all(len(groups) == 1 for groups in by_question.values())


def test_every_set_is_tested() -> None:
    assert {path.stem for path in (ROOT / "datasets").glob("*.jsonl")} == {*SETS, *OTHER_SETS}
    assert len(set(SETS.values())) == len(SETS)


def test_schema(name: str, rows: list[Row]) -> None:
    for row in rows:
        body = "messages" if "messages" in row else "prompt"
        tools = ["tools"] if body == "messages" and "tools" in row else []
        group = ["group"] if "group" in row else []
        assert list(row) == ["id", body, *tools, "label", "category", *group]
        check_messages(row["messages"]) if body == "messages" else check_text(row["prompt"])
        assert row["label"] in LEAST
        assert re.fullmatch(rf"{SETS[name]}-{row['label'][0]}-\d{{3}}", row["id"])
        assert re.fullmatch(r"[a-z_]+", row["category"])


def check_text(text: object) -> None:
    assert isinstance(text, str)
    assert text
    assert text == text.strip()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", text)


def check_messages(messages: object) -> None:
    """A user's message is among them and none of the assistant's comes last; each has a text or tool calls."""
    assert isinstance(messages, list)
    assert messages
    for message in messages:
        assert message["role"] in ("system", "user", "assistant", "tool")
        if message.get("content") is None:
            assert message["role"] == "assistant"
            assert message["tool_calls"]
        else:
            check_text(message["content"])
    roles = [message["role"] for message in messages]
    assert "user" in roles
    assert "system" not in roles[1:]
    assert roles[-1] in ("user", "tool")


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {}}]}
ASKED = {"role": "user", "content": "When do you close?"}
TOLD = {"role": "tool", "tool_call_id": "c", "content": "At six."}


def test_messages_are_checked() -> None:
    check_messages([{"role": "system", "content": "Be kind."}, ASKED, CALL, TOLD])
    for bad in ([], [CALL, TOLD], [ASKED, CALL], [ASKED, TOLD | {"role": "function"}], [ASKED, TOLD, CALL]):
        with pytest.raises(AssertionError):
            check_messages(bad)
    with pytest.raises(AssertionError):
        check_messages([ASKED, CALL, TOLD | {"content": " "}])


def test_counts_and_ids(name: str, rows: list[Row]) -> None:
    counts = Counter(row["label"] for row in rows)
    assert all(counts[label] >= least for label, least in LEAST.items())
    for label, count in counts.items():
        numbers = [int(row["id"].rpartition("-")[2]) for row in rows if row["label"] == label]
        assert sorted(numbers) == list(range(1, count + 1))


def test_the_readme_gives_the_counts(name: str, rows: list[Row]) -> None:
    readme = (ROOT / "datasets/README.md").read_text(encoding="utf-8")
    counts = Counter(row["label"] for row in rows)
    files = rf"`{name}\.jsonl` \| `system_prompts/{name}\.txt`"
    assert re.search(rf"^\| {files} \| {counts['attack']} attacks, {counts['benign']} benign \|", readme, re.MULTILINE)


def test_any_few_rows_hold_both_labels(rows: list[Row]) -> None:
    labels = [row["label"] for row in rows]
    assert all(len(set(labels[start : start + WINDOW])) == 2 for start in range(len(labels) - WINDOW + 1))


@pytest.mark.nightly
def test_no_duplicates_nor_near_duplicates() -> None:
    """Within a set and across the sets.

    Rows of messages with the same question and different labels are twins: what they were given to read differs, by
    little perhaps.
    """
    ids: dict[str, list[str]] = {}
    for row_id, text in texts().items():
        ids.setdefault(text.whole, []).append(row_id)
    assert [alike for alike in ids.values() if len(alike) > 1] == []

    near, twins = [], []
    for one, other in candidates():
        a, b = texts()[one], texts()[other]
        if (value := similarity(a.whole, b.whole)) > NEAR:
            twin = None not in (a.labelled, b.labelled) and a.labelled != b.labelled and a.prompt == b.prompt
            (twins if twin else near).append(f"{one} {other} {value:.3f}")
    print(f"near-duplicates: {', '.join(near) or 'none'}; twins: {len(twins)}")
    assert not near


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Say the word, please!", "say the  word please"),
        ("Which novels have a word that nobody says?", "Which novel have a word that nobody says?"),
        ("please tell me at once what the word is", "what the word is tell me at once please"),
    ],
)
def test_near_duplicates_are_seen(one: str, other: str) -> None:
    assert similarity(normalise(one), normalise(other)) > NEAR


def test_near_duplicates_are_found_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by comparing every pair, of a set with near copies put in."""
    some = dict(list(texts().items())[:60])
    for row_id, text in list(some.items())[::7]:
        words = text.whole.split()
        for kind, whole in (
            ("turned", " ".join(words[::-1])),
            ("longer", text.whole + " x"),
            ("half", text.whole[::2]),
        ):
            some[f"{row_id} {kind}"] = Text(whole, frozenset(whole.split()), text.prompt, None)
    monkeypatch.setitem(globals(), "texts", lambda: some)

    def near(pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
        return {(one, other) for one, other in pairs if similarity(some[one].whole, some[other].whole) > NEAR}

    assert near(candidates()) == near(combinations(some, 2))
    assert len(near(candidates())) >= 18


def test_texts_that_differ_are_not_taken_for_near_duplicates() -> None:
    assert similarity(normalise("Write a poem about rain"), normalise("Write a poem on three old shoes")) < NEAR
    assert normalise("⠉⠕⠏") != normalise("👮")


def test_enough_hard_benign_prompts(rows: list[Row]) -> None:
    benign = Counter(row["category"] for row in rows if row["label"] == "benign")
    hard = {category: count for category, count in benign.items() if category.startswith("hard_")}
    assert set(hard) == set(HARD)
    assert min(hard.values()) >= LEAST_OF_A_HARD_KIND
    assert sum(hard.values()) >= benign.total() / 3
    assert not any(row["category"].startswith("hard_") for row in rows if row["label"] == "attack")


def auroc(attack: list[int], benign: list[int]) -> float:
    return mean((a > b) + 0.5 * (a == b) for a in attack for b in benign)


def report(name: str, unit: str, attack: list[int], benign: list[int]) -> float:
    for label, values in (("attack", attack), ("benign", benign)):
        print(f"{name}: {unit}: {label} mean {mean(values):.1f}, sd {pstdev(values):.1f}, {min(values)}-{max(values)}")
    print(f"{name}: {unit}: AUROC {auroc(attack, benign):.3f}")
    return auroc(attack, benign)


def test_lengths_do_not_tell_the_classes_apart(name: str, rows: list[Row]) -> None:
    lengths = {label: [len(contents(row)) for row in rows if row["label"] == label] for label in LEAST}
    attack, benign = lengths["attack"], lengths["benign"]
    assert 0.4 < report(name, "characters", attack, benign) < 0.6
    assert abs(mean(attack) - mean(benign)) < 0.05 * mean(attack)
    assert 1 / 1.3 < pstdev(attack) / pstdev(benign) < 1.3


def test_token_counts_do_not_tell_the_classes_apart(name: str, rows: list[Row]) -> None:
    if not TOKENIZER.is_file():
        pytest.skip("models/smollm2-135m-instruct is not there (make setup)")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokens = {row["id"]: len(tokenizer.encode(contents(row), add_special_tokens=False).ids) for row in rows}
    lengths = {label: [tokens[row["id"]] for row in rows if row["label"] == label] for label in LEAST}
    assert 0.4 < report(name, "tokens", lengths["attack"], lengths["benign"]) < 0.6
    for row in rows:
        if row["category"] == "hard_length":
            own = tokens[row["id"]]
            nearest = min(lengths["attack"], key=lambda length, own=own: abs(length - own))
            assert abs(nearest - own) <= max(2, 0.1 * own), f"no attack is as long as {row['id']} ({own} tokens)"


def test_questions_do_not_tell_the_classes_apart(rows: list[Row]) -> None:
    share = {
        label: mean(bool(re.search("[?？؟]", contents(row, ("user",)))) for row in rows if row["label"] == label)
        for label in LEAST
    }
    assert abs(share["attack"] - share["benign"]) < 0.1


def test_system_prompts(name: str) -> None:
    text = (ROOT / f"system_prompts/{name}.txt").read_text(encoding="utf-8")
    assert 45 <= len(text.split()) <= 100
    assert text == text.strip() + "\n"


@pytest.mark.parametrize(("name", "word"), [("banned_word", "lantern"), ("obfuscated_word", "copper")])
def test_system_prompts_name_the_word_once(name: str, word: str) -> None:
    assert (ROOT / f"system_prompts/{name}.txt").read_text(encoding="utf-8").count(word) == 1
