"""The figures: files that an image reader takes, whatever the data, with what they should say on them."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from headrift import figures
from headrift.figures import heatmaps_png, scores_png
from headrift.stats import Separation

GRID = np.linspace(0, 1, 101)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    seen: list[Figure] = []
    save = figures.save

    def spy(figure: Figure, path: Path) -> None:
        seen.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save", spy)
    return seen


def texts_of(figure: Figure) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def groups(seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    sizes = {("attack", "direct"): 30, ("attack", "riddle"): 2, ("benign", "hard_topic"): 800, ("benign", "plain"): 9}
    made = {name: random.random(n) / 5 for name, n in sizes.items()}
    made["attack", "direct"][:10] = np.nan
    made["attack", "riddle"][:] = np.nan
    return made


def curve(band: bool = False) -> Separation:
    return Separation(
        auroc=0.75,
        auroc_interval=None,
        tpr=0.5,
        tpr_interval=None,
        fpr=GRID,
        tprs=GRID**0.5,
        grid=GRID,
        band=np.stack([GRID, GRID**0.2]) if band else None,
        n=np.inf,
        draws=np.empty(0),
    )


def pixels(path: Path) -> np.ndarray:
    image = matplotlib.image.imread(path)
    assert image.std() > 0.05  # something is drawn
    return image


def test_scores_and_curves(tmp_path, drawn):
    scores_png(tmp_path / "s.png", groups(), {"score": curve(True), "prompt length": curve()}, title="run")
    image = pixels(tmp_path / "s.png")
    assert image.shape[1] > 1200
    (figure,) = drawn
    words = texts_of(figure)
    for expected in (
        "attack: all",
        "benign: hard_topic",
        "20 of 30",
        "0 of 2",
        "20 of 32",
        "inter-head instability (std of the heads' share, 0 to 0.5)",
        "false positive rate",
        "true positive rate",
        "score: AUROC 0.750",
        "score: 95% interval",
        "run",
    ):
        assert expected in words
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]


def test_a_detectors_values_and_its_threshold(tmp_path, drawn):
    scores_png(tmp_path / "s.png", groups(), {"detector": curve(True)}, label="detector: readout", threshold=0.12)
    pixels(tmp_path / "s.png")
    (figure,) = drawn
    words = texts_of(figure)
    assert "detector: readout" in words
    assert "with a value" in words
    assert "threshold" in words
    assert "instability" not in words
    assert [0.12, 0.12] in [list(line.get_xdata()) for line in figure.axes[0].lines]


def test_without_labels_there_is_one_panel(tmp_path, drawn):
    scores_png(tmp_path / "s.png", {("unlabelled", ""): np.array([0.1, 0.2])})
    assert len(drawn[0].axes) == 1
    assert "unlabelled: all" not in texts_of(drawn[0])
    pixels(tmp_path / "s.png")


@pytest.mark.parametrize("nothing", [{}, {("attack", "a"): np.array([np.nan, np.nan])}])
def test_no_score_no_file(tmp_path, nothing):
    scores_png(tmp_path / "s.png", nothing)
    assert list(tmp_path.iterdir()) == []


def test_names_of_any_kind_and_number(tmp_path, drawn, recwarn):
    names = ["$x", "$\\frac$", "\0\x1b[31m", "漢字", "a" * 200, *map(str, range(60))]
    scores_png(tmp_path / "s.png", {("benign", name): np.array([0.1]) for name in names}, title="$" * 300)
    assert pixels(tmp_path / "s.png").shape[0] < 3000
    assert "\x1b" not in texts_of(drawn[0])
    assert [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)] == []


def test_classes_are_told_apart_without_colour_vision():
    """Lightness alone tells attack from benign, in the worst case of seeing no colour at all."""
    from matplotlib.colors import to_rgb

    light = {name: np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722]) for name, colour in figures.COLOURS.items()}
    assert abs(light["attack"] - light["benign"]) > 0.03


def test_heatmaps(tmp_path, drawn):
    values = np.random.default_rng(0).random((5, 30))
    values[4, 3] = np.nan
    panels = {"instability": values, "share": values}
    heatmaps_png(tmp_path / "h.png", panels, window=(1, 12), layers=(7, 25), title="$row$")
    pixels(tmp_path / "h.png")
    words = texts_of(drawn[0])
    for expected in (
        "instability",
        "share",
        "$row$",
        "layer (0: nearest the input)",
        "step (0: the prompt's last token)",
    ):
        assert expected in words


def test_heatmap_of_an_answer_that_ended_at_once(tmp_path):
    heatmaps_png(tmp_path / "h.png", {"x": np.full((1, 4), np.nan)}, window=(1, 12), layers=(1, 3), title="t")
    assert (tmp_path / "h.png").stat().st_size > 1000
