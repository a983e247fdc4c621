"""The page and its files: what is on it, for runs with everything and for runs that lack something."""

import base64
import json
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from headrift.calibration.calibrate import calibrate
from headrift.calibration.thresholds import CalibrateConfig as CalibrationSettings
from headrift.calibration.thresholds import CalibrationError
from headrift.corpus import summary as summaries
from headrift.report import html, measure
from headrift.report.report import Report, ReportConfig
from headrift.runs.detector_input import detector_values
from headrift.runs.reading import open_run
from headrift.signal import Window


class Page(HTMLParser):
    """The page's text, tags, attributes that name an address, and images."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words, self.tags, self.addresses, self.images = "", [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.words = " ".join(self.words.split())
        self.numbers = json.loads((path.with_name(f"{path.stem}-files") / "figures.json").read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = dict(attributes)
        self.addresses += [value for key, value in named.items() if key in ("src", "href", "action", "data", "poster")]
        if tag == "img":
            self.images.append(named)

    def handle_data(self, data):
        if "style" not in self.tags[-1:]:
            self.words += data


@pytest.fixture(scope="module")
def page(labelled):
    return Page(labelled)


def test_the_page_needs_nothing_else(page):
    assert "script" not in page.tags
    assert set(page.tags) & {"link", "iframe", "object", "video", "form", "base"} == set()
    assert [at for at in page.addresses if not at.startswith(("#", "data:image/png;base64,"))] == []
    assert "url(" not in page.source.split("</style>")[0]
    assert "default-src 'none'" in page.source


def test_images_have_words_and_their_size(page):
    assert len(page.images) > 15
    assert all(len(image["alt"]) > 15 for image in page.images)
    assert len({image["alt"] for image in page.images}) == len(page.images)
    for image in page.images:
        drawn = Image.open(BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        assert drawn.size == (int(image["width"]), int(image["height"]))


def test_what_a_prompt_holds_is_text(page):
    assert '<script>document.title="taken over"</script><img src=' in page.words
    assert page.source.count("<img") == len(page.images)
    assert "Never say the <b>secret</b> word." in page.words
    assert "<b>secret" not in page.source


def test_every_figure_is_in_the_folder(page, labelled):
    files = {path.name for path in labelled.with_name("report-files").iterdir()}
    names = {name.removesuffix(".png") for name in files if name.endswith(".png")}
    assert len(names) == len(page.images)
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg")} | {"figures.json"}
    assert {"scores", "roc", "steps", "windows", "heatmap_difference", "layers", "runs", "signals"} <= names
    assert [path.name for path in labelled.parent.iterdir() if path.name.startswith(".")] == []


def test_the_tables_say_what_the_numbers_say(page):
    score = page.numbers["comparisons"][0]["measures"][summaries.SCORE]
    low, high = score["auroc_interval"]
    auroc, text = score["auroc"], page.numbers["summary"]
    verdict = page.numbers["verdicts"]["Attack against benign"][summaries.SCORE]
    assert f"AUROC {auroc:.2f}: an attack outscores a benign prompt {auroc:.0%} of the time" in page.words
    assert (verdict == "shown: higher in attacks") == (low > 0.5)
    assert f"{auroc:.3f} {low:.3f} to {high:.3f} {verdict}" in page.words
    assert "80 attacks and 140 benign prompts from 2 runs" in text[0]
    assert text[0] in page.words
    early = page.numbers["classes"]["attack"]["early"]
    assert f"{early:.1%}" in page.words
    assert len(page.numbers["auroc_by_step"]["auroc"]) == 8
    assert set(page.numbers["side_by_side"]) >= {"signals", "increments", "findings"}
    assert "fail terms were given" in page.words.lower()


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((0.51, 0.6), "above"), ((0.49, 0.6), html.NOT_SHOWN), ((0.3, 0.49), "below"), (None, "too few prompts")],
)
def test_the_interval_decides_the_verdict(interval, expected):
    assert html.verdict(interval, "above", "below", 0.5) == expected


@pytest.fixture
def few(monkeypatch):
    """One row of a kind is shown, for speed's sake."""
    monkeypatch.setattr(measure, "MOST_EXAMPLES", 1)


@pytest.mark.usefixtures("few")
def test_runs_without_labels(write, tmp_path):
    run = write(tmp_path / "log", n_attack=0, n_benign=30, label=[None] * 30, n_steps=None)
    Report([run], ReportConfig(tmp_path / "log.html", resamples=5)).write()
    page = Page(tmp_path / "log.html")
    assert "None of these rows is labelled" in page.words
    assert "30 rows without a label" in page.words
    assert "The highest scores" in page.words
    assert "The quietest attacks" not in page.words
    assert page.words.count("needs attacks and benign prompts") == 3
    assert "comparisons" not in page.numbers


@pytest.mark.usefixtures("few")
def test_benign_prompts_only_and_no_texts(write, tmp_path):
    none = np.full(20, np.nan)
    run = write(tmp_path / "b", 0, 20, save=(), n_steps=None, entropy=none, category=[None] * 20)
    Report([run], ReportConfig(tmp_path / "b.html", resamples=0)).write()
    page = Page(tmp_path / "b.html")
    assert "There are no attacks among these rows" in page.words
    assert "The run kept no texts (score with --save text)." in page.words
    assert "Not recorded in these runs: next-token entropy" in page.words


@pytest.mark.usefixtures("few")
def test_no_row_has_a_score(write, tmp_path):
    run = write(tmp_path / "n", 10, 15, n_steps=[0] * 25)
    Report([run], ReportConfig(tmp_path / "n.html", resamples=0)).write()
    page = Page(tmp_path / "n.html")
    assert "No row has a score in this window." in page.words
    assert "answer_ended_before_window" in page.words


@pytest.mark.usefixtures("few")
def test_redacted_with_a_calibration(write, tmp_path, monkeypatch):
    """Neither on the page nor in a file is a text; the calibration's window is used; a draw is stated."""
    runs = [write(tmp_path / name, 20, 80, seed=seed) for seed, name in enumerate(("one", "two"))]
    made = calibrate([open_run(runs[0])], CalibrationSettings(window=Window(3, 5), resamples=0))
    made.save(tmp_path / "c.json")
    monkeypatch.setattr(summaries, "_MAX_OF_CLASS", 60)
    out = tmp_path / "r.html"
    config = ReportConfig(out, tmp_path / "c.json", redact=True, fail_terms=("terribly secret",), resamples=0)
    Report(runs, config).write()
    page = Page(out)
    for path in [out, *(tmp_path / "r-files").iterdir()]:
        content = path.read_bytes()
        for text in (b"taken over", b"secret", b"answer 1 ", b"prompt 1 "):
            assert text not in content, path.name
    assert "Prompt and answer are left out (--redact)." in page.words
    assert "one-" in page.words  # ids stay
    assert f"at or above {made.threshold:.6f}: instability, attacks higher (steps 3:5" in page.words
    assert "over steps 3:5" in page.words
    assert "60 rows per class" in page.words
    assert "drift" in page.numbers
    assert set(page.numbers["flagged"]) == {"attack", "benign"}


def older_report(out: Path) -> None:
    folder = out.with_name(f"{out.stem}-files")
    folder.mkdir()
    out.write_text("older")
    for name in ("figures.json", "old.png"):
        (folder / name).write_text("older")


@pytest.mark.usefixtures("few")
def test_an_older_report_gives_way(write, tmp_path):
    out = tmp_path / "r.html"
    older_report(out)
    Report([write(tmp_path / "run", 0, 12, n_steps=None)], ReportConfig(out, resamples=0)).write()
    assert out.read_text() != "older"
    assert not (tmp_path / "r-files" / "old.png").exists()


def test_a_failing_disk_leaves_the_older_report(write, tmp_path, monkeypatch):
    run, out = write(tmp_path / "run", 0, 12, n_steps=None), tmp_path / "r.html"
    older_report(out)
    before = out.read_bytes(), sorted(path.name for path in tmp_path.rglob("*"))

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html.Output, "picture", fails)
    with pytest.raises(OSError, match="No space"):
        Report([run], ReportConfig(out, resamples=0)).write()
    assert (out.read_bytes(), sorted(path.name for path in tmp_path.rglob("*"))) == before


def test_backticks_are_code_and_nothing_else_is(tmp_path):
    assert str(html.mark_code("use `a<b` & c")) == "use <code>a&lt;b</code> &amp; c"
    assert str(html.mark_code("it`s <i>")) == "it`s &lt;i&gt;"


ABOUT_STEPS = {"steps", "layers", "onset", "success", "normalisation"}


def section_keys(page: Page) -> set[str]:
    return {at.removeprefix("#") for at in page.addresses if at.startswith("#")}


def test_runs_of_step_0_alone(step_0_runs, tmp_path):
    Report(step_0_runs, ReportConfig(tmp_path / "r.html", resamples=5)).write()
    page = Page(tmp_path / "r.html")
    assert "These runs recorded step 0, the prompt's last token, alone" in page.words
    assert "Without a --calibration these rows have no score" in page.words
    keys = section_keys(page)
    assert keys & {*ABOUT_STEPS, "beside"} == set()
    assert {"runs", "signals", "strata", "increments", "examples", "settings"} <= keys
    aurocs = {one["name"]: one["auroc"] for one in page.numbers["side_by_side"]["signals"] if one["auroc"]}
    assert set(aurocs) == {"focus", "prompt_tokens"}
    assert aurocs["focus"]["value"] < 0.2
    assert list(page.numbers["comparisons"][0]["measures"]) == ["prompt length"]
    assert "no steps after step 0" in page.words
    assert "instability over steps" not in page.words
    assert "no_window 320" in page.words


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    "signal", ["readout", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("novelty", "focus"))]
)
def test_runs_of_step_0_are_scored_by_a_calibrations_detector(step_0_runs, tmp_path, signal):
    runs = [open_run(run) for run in step_0_runs]
    calibration = calibrate(runs, CalibrationSettings(target_fpr=0.1, resamples=20, signal=signal))
    calibration.save(tmp_path / "c.json")
    Report(step_0_runs, ReportConfig(tmp_path / "r.html", tmp_path / "c.json", resamples=5)).write()
    page = Page(tmp_path / "r.html")
    keys = section_keys(page)
    assert keys & ABOUT_STEPS == set()
    assert {"scores", "separation", "runs", "calibration", "beside", "examples"} <= keys
    values = detector_values(runs, calibration.detector, 320)
    attack = np.tile(np.arange(160) < 60, 2)
    score = page.numbers["comparisons"][0]["measures"][summaries.SCORE]
    assert score["auroc"] == pytest.approx(roc_auc_score(attack, values), abs=1e-4)
    assert page.numbers["flagged"]["attack"]["flagged"] == (values[attack] >= calibration.threshold).sum()
    benign = np.flatnonzero(~attack)
    row = int(benign[values[benign].argmax()])
    highest = page.numbers["examples"]["highest"][0]
    assert (highest["run"], highest["id"]) == (("one", "two")[row // 160], f"r{row % 160}")
    assert highest["score"] == pytest.approx(values[row], rel=1e-4)
    assert f"score: value of the calibration's detector ({calibration.label})".lower() in page.words.lower()
    alts = [image["alt"] for image in page.images]
    assert ("What the readout tells attacks by, layer by head" in alts) == (signal == "readout")
    assert any(alt.startswith("What each head adds") for alt in alts) == (signal != "focus")
    assert "coefficients" not in json.dumps(page.numbers["calibration"])


@pytest.mark.usefixtures("few")
def test_the_calibration_begins_with_its_verdict_and_has_what_it_was_compared_with(step_0_runs, tmp_path):
    calibration = calibrate([open_run(run) for run in step_0_runs], CalibrationSettings(target_fpr=0.1, resamples=20))
    calibration.save(tmp_path / "c.json")
    Report(step_0_runs, ReportConfig(tmp_path / "r.html", tmp_path / "c.json", resamples=0)).write()
    section = Page(tmp_path / "r.html").words.rpartition("At the calibration's threshold ")[2]
    first = calibration.verdict.lines[0]
    assert section.startswith(f"{first[0].upper()}{first[1:]}.")
    assert {"words", "prompt_tokens", "readout", "focus"} <= {one.name for one in calibration.comparison}
    for place, one in enumerate(calibration.comparison):
        if one.absent is not None:
            assert f"{one.label} {one.absent}" in section
            continue
        row = f"{one.label} {html.show_number(one.auroc.value)} {html.show_interval(one.auroc.interval)}"
        if place:
            row += f" {html.show_number(one.difference.value)} {html.show_interval(one.difference.interval)}"
        assert row in section


@pytest.mark.nightly
@pytest.mark.usefixtures("few")
def test_a_readout_beside_runs_with_instability(write, tmp_path):
    """The scores stay instability's, and the readout's threshold is not drawn among them."""
    random = np.random.default_rng(3)
    log_odds = random.standard_normal((160, 2, 10, 4))
    log_odds[:60, :, 4, 2] += 3
    kept = [row.astype(np.float16).ravel() for row in log_odds]
    columns = {"logit_shares": kept, "system_tokens": np.full(160, 15)}
    run = write(tmp_path / "run", 60, 100, **columns)
    calibration = calibrate([open_run(run)], CalibrationSettings(target_fpr=0.1, resamples=20, signal="readout"))
    assert calibration.detector.windowed
    calibration.save(tmp_path / "c.json")
    report = Report([run], ReportConfig(tmp_path / "r.html", tmp_path / "c.json", resamples=5))
    assert report._threshold() is None
    report.write()
    page = Page(tmp_path / "r.html")
    assert section_keys(page) >= ABOUT_STEPS
    assert "Score: mean instability over steps 2:6" in page.words
    values = detector_values([open_run(run)], calibration.detector, 160)
    assert page.numbers["flagged"]["attack"]["flagged"] == (values[:60] >= calibration.threshold).sum()
    other = write(tmp_path / "other", 60, 100, window=Window(1, 8), **columns)
    with pytest.raises(CalibrationError, match="calibration: 2:6, given: 1:8"):
        Report([other], ReportConfig(tmp_path / "o.html", tmp_path / "c.json"))
