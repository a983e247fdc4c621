"""The signal's definitions, against numpy by hand, scipy, slow loops, and a file of the original project."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import stats

from headrift import signal
from headrift.signal import Window

SEED_DATA = Path(__file__).resolve().parents[2].parent / "shared/seed_data"
SHARES = arrays(np.float32, array_shapes(min_dims=3, max_dims=3, max_side=7), elements=st.floats(0, 1, width=32))
SEEDS = st.integers(0, 2**32 - 1)
SMALL = settings(max_examples=50, deadline=None)


def random_shares(seed: int, rows: int, layers: int, heads: int) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, layers, heads), dtype=np.float32)


# share


def test_share_divides_and_guards_small_prompt_mass() -> None:
    got = signal.share([0.2, 0.5, 1e-12, 0.0, 1e-9], [0.8, 0.5, 1e-10, 0.0, 1e-9])
    np.testing.assert_allclose(got, [0.25, 1.0, 0.0, 0.0, 1.0])
    assert got.dtype == np.float64


@pytest.mark.filterwarnings("error")
def test_share_keeps_nan_whichever_side_it_is_on() -> None:
    nan = np.nan
    assert np.isnan(signal.share([nan, 0.5, nan, nan], [0.5, nan, nan, 0.0])).all()


def test_share_divides_in_float64() -> None:
    system, prompt = np.float32(0.1), np.float32(0.3)
    assert signal.share(system, prompt) == float(system) / float(prompt)


# instability


@given(SHARES)
@SMALL
def test_instability_is_the_population_std_by_hand(share: np.ndarray) -> None:
    wide = share.astype(np.float64)
    by_hand = np.sqrt(((wide - wide.mean(axis=2, keepdims=True)) ** 2).sum(axis=2) / share.shape[2])
    got = signal.instability(share)
    assert got.shape == share.shape[:2]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, by_hand, atol=1e-12)
    assert (got <= 0.5 + 1e-12).all()


def test_instability_is_not_the_sample_std() -> None:
    share = random_shares(0, 3, 4, 32)
    sample = np.std(share.astype(np.float64), axis=2, ddof=1)
    np.testing.assert_allclose(signal.instability(share) * math.sqrt(32 / 31), sample)


def test_instability_of_two_opposite_heads_is_the_largest() -> None:
    assert signal.instability([[[0.0, 1.0]]]).tolist() == [[0.5]]


@given(SHARES, st.randoms(use_true_random=False))
@SMALL
def test_permuting_heads_changes_nothing(share: np.ndarray, random) -> None:
    order = list(range(share.shape[2]))
    random.shuffle(order)
    np.testing.assert_allclose(signal.instability(share[..., order]), signal.instability(share), atol=1e-12)


@given(st.floats(0, 1), st.integers(1, 40))
@SMALL
def test_equal_heads_give_exactly_zero(value: float, heads: int) -> None:
    for dtype in (np.float16, np.float32, np.float64):
        assert (signal.instability(np.full((2, 3, heads), value, dtype)) == 0).all()
    assert (signal.instability(np.full((2, 3, 10), 0.1)) == 0).all()  # where numpy's own std gives 1e-17


@given(SHARES, st.floats(0.001, 1000), st.floats(-1, 1))
@SMALL
def test_instability_scales_and_ignores_a_common_shift(share: np.ndarray, factor: float, shift: float) -> None:
    got = signal.instability(share.astype(np.float64) * factor + shift)
    np.testing.assert_allclose(got, signal.instability(share) * factor, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("error")
def test_one_nan_head_makes_its_cell_nan_and_no_other() -> None:
    for head in range(4):
        share = random_shares(1, 3, 2, 4)
        share[1, 0, head] = np.nan
        expected = np.zeros((3, 2), bool)
        expected[1, 0] = True
        assert (np.isnan(signal.instability(share)) == expected).all()


def test_instability_without_heads_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one head"):
        signal.instability(np.zeros((2, 3, 0)))


# covered


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 10), st.integers(1, 20))
@SMALL
def test_covered_agrees_with_the_keys_attended(n_rows: int, window: int, start: int, length: int) -> None:
    prompt_len = start + length
    got = signal.covered(n_rows, [window, None], start, prompt_len)
    for t in range(n_rows):
        q = prompt_len - 1 + t
        attended = {k for k in range(q + 1) if q - k < window}
        assert got[t, 0] == (set(range(start, prompt_len)) <= attended)
        assert got[t, 1]


def test_covered_to_the_token() -> None:
    # 10 prompt tokens: step 0 is at position 9. A window of 8 there reaches back to key 2, one step later to key 3.
    assert signal.covered(3, [8], 3, 10)[:, 0].tolist() == [True, True, False]
    assert signal.covered(3, [8], 2, 10)[:, 0].tolist() == [True, False, False]
    assert signal.covered(3, [8], 1, 10)[:, 0].tolist() == [False, False, False]
    assert signal.covered(3, [12, 11, 10, 9], 0, 10).tolist() == [
        [True, True, True, False],
        [True, True, False, False],
        [True, False, False, False],
    ]
    assert signal.covered(2, [None, 4], 0, 10).dtype == np.bool_
    with pytest.raises(ValueError, match="at least 1 token"):
        signal.covered(2, [None, 0], 0, 10)


# layers, windows, steps


@pytest.mark.parametrize(
    ("n_layers", "expected"),
    [(1, (0, 1)), (2, (1, 2)), (3, (2, 3)), (4, (2, 3)), (12, (3, 10)), (30, (7, 25)), (32, (8, 27))],
)
def test_layer_range(n_layers: int, expected: tuple[int, int]) -> None:
    assert signal.layer_range(n_layers) == expected


@given(st.integers(1, 200), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
@SMALL
def test_layer_range_is_never_empty_nor_out_of_range(n_layers: int, shallow: float, deep: float) -> None:
    start, end = signal.layer_range(n_layers, shallow, deep)
    assert 0 <= start < end <= n_layers


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0,), "at least 1 layer"),
        ((8, -0.1), "drop_shallow must be at least 0 and below 1, got -0.1"),
        ((8, 1.0), "drop_shallow"),
        ((8, 0.1, 1.0), "drop_deep"),
        ((8, 0.1, math.nan), "drop_deep"),
    ],
)
def test_layer_range_refuses(args: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        signal.layer_range(*args)


def test_window_reads_and_writes() -> None:
    assert Window.parse("1:12") == Window(1, 12)
    assert str(Window.parse(" 3 : 3 ")) == "3:3"
    assert len({Window(1, 2), Window.parse("1:2")}) == 1


@pytest.mark.parametrize("text", ["", "3", "1:", ":4", "1:2:3", "a:b", "1-3", "1.0:2", "0:3", "-1:3", "4:3", "1_0:12"])
def test_window_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="window"):
        Window.parse(text)


@pytest.mark.parametrize(("start", "end"), [(0, 1), (-1, 2), (3, 2)])
def test_window_refuses_impossible_bounds(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="1 <= a <= b"):
        Window(start, end)


@pytest.mark.parametrize(
    ("tokens", "steps", "expected"), [(0, 12, 0), (1, 12, 0), (2, 12, 1), (13, 12, 12), (14, 12, 12), (99, 12, 12)]
)
def test_n_steps(tokens: int, steps: int, expected: int) -> None:
    assert signal.n_steps(tokens, steps) == expected


# score


def plain_score(values: np.ndarray, window: Window, n_steps: int) -> tuple[float | None, int]:
    """The definition as loops."""
    start, end = signal.layer_range(values.shape[1])
    cells: list[float] = []
    scored = 0
    for t in range(window.start, window.end + 1):
        row = [values[t, layer] for layer in range(start, end) if t <= n_steps and not np.isnan(values[t, layer])]
        cells += row
        scored += bool(row)
    return (sum(cells) / len(cells) if cells else None), scored


@given(SEEDS, st.integers(1, 40), st.integers(1, 6), st.integers(0, 6), st.integers(0, 14), st.floats(0, 1))
@SMALL
def test_score_is_the_plain_mean_of_counted_cells(
    seed: int, layers: int, first: int, more: int, n_steps: int, gone: float
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.random((13, layers), dtype=np.float32)
    values[rng.random(values.shape) < gone] = np.nan
    window = Window(first, first + more)
    got = signal.score(values, window, n_steps=min(n_steps, 12))
    value, scored = plain_score(values.astype(np.float64), window, n_steps)
    assert got.n_scored == scored
    assert got.value == (None if value is None else pytest.approx(value, abs=1e-12))
    assert (got.reason is None) == (value is not None)


@given(SEEDS, st.sampled_from([1, 2, 3, 30, 32]))
@SMALL
def test_score_looks_at_nothing_outside_window_layers_and_answer(seed: int, layers: int) -> None:
    values = np.random.default_rng(seed).random((9, layers))
    start, end = signal.layer_range(layers)
    outside = np.full_like(values, 1e6)
    outside[2:6, start:end] = values[2:6, start:end]
    outside[0] = np.nan
    for window, n_steps in ((Window(2, 5), 8), (Window(2, 8), 5), (Window(2, 5), 5)):
        expected = values[2:6, start:end].mean()
        assert signal.score(outside, window, n_steps=n_steps).value == pytest.approx(expected)


def test_the_prefill_row_is_never_scored() -> None:
    values = np.random.default_rng(2).random((5, 8))
    other = values.copy()
    other[0] = 100.0
    for window in (Window(1, 1), Window(1, 4), Window(1, 9)):
        assert signal.score(values, window, n_steps=4) == signal.score(other, window, n_steps=4)


def test_score_weighs_cells_not_steps() -> None:
    values = np.zeros((3, 4))
    values[1] = [0, 0, 1.0, np.nan]
    values[2] = [0, 0, 0.0, 0.0]
    got = signal.score(values, Window(1, 2), n_steps=2, drop_shallow=0.5, drop_deep=0)
    assert got == signal.Score(1 / 3, None, 2)


def test_short_answers_are_scored_over_the_steps_they_have() -> None:
    values = np.arange(5.0)[:, None] * np.ones((5, 8))
    assert signal.score(values, Window(1, 12), n_steps=4) == signal.Score(2.5, None, 4)
    assert signal.score(values, Window(3, 12), n_steps=3) == signal.Score(3.0, None, 1)
    ended = signal.Score(None, "answer_ended_before_window", 0)
    assert signal.score(values, Window(4, 12), n_steps=3) == ended
    assert signal.score(values, Window(1, 12), n_steps=0) == ended
    assert signal.score(np.empty((0, 8)), Window(1, 12), n_steps=signal.n_steps(0, 12)) == ended


@pytest.mark.filterwarnings("error")
def test_all_nan_says_that_the_span_was_lost() -> None:
    values = np.full((6, 8), np.nan)
    values[0] = 0.1
    values[:, :2] = 0.1
    assert signal.score(values, Window(1, 5), n_steps=5) == signal.Score(None, "window_lost_system_span", 0)
    values[2, 3] = 0.25
    assert signal.score(values, Window(1, 5), n_steps=5) == signal.Score(0.25, None, 1)


def test_sliding_layers_drop_out_of_the_score() -> None:
    share = random_shares(3, 4, 4, 8)
    windows = [
        None,
        None,
        None,
        11,
    ]  # layer 3 reaches key 0 from position 10 at most: steps 0 and 1 of 10 prompt tokens
    full = signal.instability(share)
    values = np.where(signal.covered(4, windows, 0, 10), full, np.nan)
    got = signal.score(values, Window(1, 3), n_steps=3, drop_shallow=0.5, drop_deep=0)
    assert got.value == pytest.approx(np.mean([full[1, 2], full[1, 3], full[2, 2], full[3, 2]]))
    assert got.n_scored == 3


def test_missing_rows_are_an_error() -> None:
    values = np.zeros((3, 4))
    with pytest.raises(ValueError, match="needs row 3, but there are 3 rows"):
        signal.score(values, Window(1, 12), n_steps=3)
    with pytest.raises(ValueError, match="needs row 3"):
        signal.window_mean(values[:, 0], Window(1, 12), 3)
    assert signal.score(values, Window(1, 2), n_steps=3).n_scored == 2


def test_wrong_shapes_are_errors() -> None:
    window = Window(1, 1)
    with pytest.raises(ValueError, match=r"\[rows, layers\]"):
        signal.score(np.zeros(3), window, n_steps=1)
    with pytest.raises(ValueError, match=r"\[rows, layers, heads\]"):
        signal.mean_share(np.zeros((3, 4)), window, n_steps=1)
    with pytest.raises(ValueError, match=r"\[rows\]"):
        signal.window_mean(np.zeros((3, 4)), window, 1)
    with pytest.raises(ValueError, match="counted must be"):
        signal.head_agreement(np.zeros((3, 4, 2)), window, n_steps=1, counted=np.ones((4, 3)))


@pytest.mark.parametrize("name", ["score", "mean_share", "head_agreement"])
def test_drops_reach_the_layers(name: str) -> None:
    share = random_shares(4, 3, 10, 4)
    values = signal.instability(share) if name == "score" else share
    cut = values[:, 3:6]
    got = getattr(signal, name)(values, Window(1, 2), n_steps=2, drop_shallow=0.3, drop_deep=0.4)
    if name == "score":
        assert got.value == pytest.approx(cut[1:].mean())
    elif name == "mean_share":
        assert got == pytest.approx(cut[1:].astype(np.float64).mean())
    else:
        assert got == pytest.approx(np.mean([mean_pairwise_r(step.T) for step in cut[1:]]))


# head agreement


def mean_pairwise_r(vectors: np.ndarray) -> float:
    """scipy's Pearson r of every pair of rows, averaged."""
    pairs = combinations(vectors.astype(np.float64), 2)
    return float(np.mean([stats.pearsonr(a, b).statistic for a, b in pairs]))


@given(SEEDS, st.sampled_from([5, 12, 32]), st.integers(2, 9))
@SMALL
def test_head_agreement_against_scipy_and_numpy(seed: int, layers: int, heads: int) -> None:
    share = random_shares(seed, 4, layers, heads)
    start, end = signal.layer_range(layers)
    got = signal.head_agreement(share, Window(1, 5), n_steps=3)
    steps = [share[t, start:end].T for t in (1, 2, 3)]
    assert got == pytest.approx(np.mean([mean_pairwise_r(step) for step in steps]), abs=1e-10)
    upper = np.triu_indices(heads, 1)
    assert got == pytest.approx(
        np.mean([np.corrcoef(step.astype(np.float64))[upper].mean() for step in steps]), abs=1e-10
    )


def test_head_agreement_of_like_and_unlike_heads() -> None:
    profile = np.linspace(0.1, 0.9, 12)
    alike = np.stack([profile, profile * 0.5, profile * 0.3 + 0.2], axis=1)[None].repeat(3, axis=0)
    opposed = np.stack([profile, 1 - profile], axis=1)[None].repeat(3, axis=0)
    assert signal.head_agreement(alike, Window(1, 2), n_steps=2) == pytest.approx(1.0)
    assert signal.head_agreement(opposed, Window(1, 2), n_steps=2) == pytest.approx(-1.0)


@pytest.mark.filterwarnings("error")
def test_head_agreement_drops_constant_heads() -> None:
    share = random_shares(5, 3, 12, 6)
    expected = signal.head_agreement(share, Window(1, 2), n_steps=2)
    constant = np.full((3, 12, 2), 0.3, np.float32)
    noise = np.where(np.arange(12) % 2, np.float32(0.9), np.nextafter(np.float32(0.9), np.float32(1)))
    almost = np.broadcast_to(noise[None, :, None], (3, 12, 1))
    padded = np.concatenate([constant, share, almost], axis=2)
    assert signal.head_agreement(padded, Window(1, 2), n_steps=2) == pytest.approx(expected)
    assert signal.head_agreement(padded[..., :3], Window(1, 2), n_steps=2) is None  # one varying head
    padded[1] = 0.3  # a step of constants is skipped, not counted as 0
    only_second = signal.head_agreement(share, Window(2, 2), n_steps=2)
    assert signal.head_agreement(padded, Window(1, 2), n_steps=2) == pytest.approx(only_second)


def test_head_agreement_uses_counted_layers_only() -> None:
    share = random_shares(6, 3, 12, 5)
    counted = np.ones((3, 12), bool)
    counted[:, 4] = False
    counted[2, 6] = False
    expected = np.mean([mean_pairwise_r(share[t][[k for k in range(3, 10) if counted[t, k]]].T) for t in (1, 2)])
    assert signal.head_agreement(share, Window(1, 2), n_steps=2, counted=counted) == pytest.approx(expected)
    holes = share.copy()
    holes[:, 4, 0] = np.nan  # an unwritten head says the same as the mask
    holes[2, 6] = np.nan
    assert signal.head_agreement(holes, Window(1, 2), n_steps=2) == pytest.approx(expected)
    assert signal.head_agreement(share, Window(1, 2), n_steps=2, counted=counted & False) is None
    counted[:] = False
    counted[:, 5] = True  # one layer is no profile
    assert signal.head_agreement(share, Window(1, 2), n_steps=2, counted=counted) is None


def test_head_agreement_of_too_few_is_none() -> None:
    assert signal.head_agreement(random_shares(7, 3, 12, 1), Window(1, 2), n_steps=2) is None
    assert signal.head_agreement(random_shares(7, 3, 1, 4), Window(1, 2), n_steps=2) is None
    assert signal.head_agreement(random_shares(7, 3, 12, 4), Window(2, 3), n_steps=1) is None


@given(SEEDS)
@SMALL
def test_agreement_and_mean_share_ignore_head_order_and_the_outside(seed: int) -> None:
    share = random_shares(seed, 6, 12, 5)
    other = np.random.default_rng(seed + 1).permuted(share, axis=2) * 0 + 9
    order = np.random.default_rng(seed + 1).permutation(5)
    other[2:5, 3:10] = share[2:5, 3:10][..., order]
    for name in ("head_agreement", "mean_share"):
        measure = getattr(signal, name)
        expected = measure(share, Window(2, 4), n_steps=5)
        assert measure(other, Window(2, 4), n_steps=5) == pytest.approx(expected)
        assert measure(other, Window(2, 5), n_steps=4) == pytest.approx(expected)


# focus, means


def test_focus_heads_is_system_over_system_and_user() -> None:
    got = signal.focus_heads([[0.3, 0.0, 0.0], [0.2, 1e-10, np.nan]], [[0.1, 0.5, 0.0], [0.2, 1e-10, 0.5]])
    np.testing.assert_allclose(got, [[0.75, 0.0, 0.0], [0.5, 0.0, np.nan]])


def test_focus_means_over_the_chosen_heads() -> None:
    heads = np.arange(6.0).reshape(2, 3)
    assert signal.focus(heads) == 2.5
    assert signal.focus(heads, [(0, 1), (1, 2)]) == 3.0
    assert signal.focus(heads, iter([(1, 0)])) == 3.0
    heads[0, 0] = np.nan
    assert math.isnan(signal.focus(heads))
    assert signal.focus(heads, [(1, 1)]) == 4.0


@pytest.mark.parametrize("pair", [(2, 0), (0, 3), (-1, 0), (0, -1)])
def test_focus_refuses_heads_that_do_not_exist(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no such"):
        signal.focus(np.zeros((2, 3)), [(0, 0), pair])


def test_focus_refuses_no_heads() -> None:
    with pytest.raises(ValueError, match="at least one"):
        signal.focus(np.zeros((2, 3)), [])
    with pytest.raises(ValueError, match=r"\[layers, heads\]"):
        signal.focus(np.zeros(3))


@pytest.mark.filterwarnings("error")
def test_window_mean() -> None:
    series = np.array([100.0, 1.0, np.nan, 4.0, np.nan], np.float32)
    assert signal.window_mean(series, Window(1, 3), 4) == 2.5
    assert signal.window_mean(series, Window(1, 12), 1) == 1.0
    assert signal.window_mean(series, Window(2, 2), 4) is None
    assert signal.window_mean(series, Window(3, 9), 2) is None


@pytest.mark.filterwarnings("error")
def test_mean_share_is_over_counted_cells() -> None:
    share = random_shares(8, 4, 12, 5)
    wide = share.astype(np.float64)
    assert signal.mean_share(share, Window(1, 2), n_steps=3) == pytest.approx(wide[1:3, 3:10].mean())
    counted = np.zeros((4, 12), bool)
    counted[1, 3] = counted[2, 9] = counted[0, 5] = counted[2, 0] = True
    expected = (wide[1, 3].mean() + wide[2, 9].mean()) / 2
    assert signal.mean_share(share, Window(1, 3), n_steps=3, counted=counted) == pytest.approx(expected)
    share[2, 9, 4] = np.nan
    assert signal.mean_share(share, Window(1, 3), n_steps=3, counted=counted) == pytest.approx(wide[1, 3].mean())
    assert signal.mean_share(share, Window(2, 3), n_steps=3, counted=counted) is None
    assert signal.mean_share(share, Window(2, 3), n_steps=1) is None


# the original project's files


def seed_csv(pattern: str) -> np.ndarray:
    paths = sorted(SEED_DATA.glob(pattern))
    if not paths:
        pytest.skip(f"no {pattern} under {SEED_DATA}")
    return np.loadtxt(paths[0], delimiter=",")


def test_original_score() -> None:
    pattern = "outputs/nous/benign/what_is_the_capital_of_france__*/inter_head_std.csv"
    values = seed_csv(pattern).T  # [layers, time], column 0 the prefill
    assert values.shape[1] == 32
    got = signal.score(values, Window(2, 3), n_steps=len(values) - 1)
    assert got.value == pytest.approx(0.065797, abs=1e-6)
    assert got.n_scored == 2


def test_original_instability_from_its_heads() -> None:
    """One layer's heads [heads, time] give the same layer's row of the original inter-head std and mean."""
    run = "outputs/nous/outputs/tests/say_the_word_test.__*"
    std, mean = seed_csv(f"{run}/inter_head_std.csv"), seed_csv(f"{run}/inter_head_mean.csv")
    for layer in (0, 12):
        share = seed_csv(f"{run}/heads_system_share_layer{layer:02d}.csv").T
        np.testing.assert_allclose(signal.instability(share), std[layer], atol=1e-6)
        np.testing.assert_allclose(share.mean(axis=1), mean[layer], atol=1e-6)
