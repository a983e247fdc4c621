"""From attention mass to a score: share, instability, score, head agreement and focus.

The one place that defines the numbers: score, calibrate, gate and figures all call it. Imports numpy only. Inputs
are array-likes of any float type (float32 as drained from the device); arithmetic and outputs are float64.

Conventions, for every function here:

- Row t of a per-step array is *step* t: the query at position ``prompt_len - 1 + t``. Row 0 is the prefill (the last
  prompt token) and is in no window. Windows are 1-based and inclusive.
- ``n_steps`` is the index of the answer's last recorded step (see :func:`n_steps`); rows after it are ignored. An array
  too short to hold a step that is in the window and in the answer is a ValueError, not a shorter window.
- NaN means "not there": never written, or not counted because the layer's sliding window no longer covers the system
  span (``np.where(covered(...), instability(share), np.nan)``). It never becomes a number. Both kinds are left out
  alike: whether all that should have been written was, is for the drain to check first.
- Shares are fractions from 0 to 1, so instability and score lie in 0 to 0.5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]

MIN_SHARE = 1e-5  # log-odds are of shares clipped to this and 1 less this
MIN_MASS = 1e-9  # a denominator below this gives a share of 0
MIN_HEAD_STD = 1e-6  # a head whose shares vary less than this over layers is constant: float32 cannot tell more near 1
DROP_SHALLOW = 0.25
DROP_DEEP = 0.15
ANSWER_ENDED = "answer_ended_before_window"
LOST_SPAN = "window_lost_system_span"
NO_WINDOW = "no_window"


def share(system_mass: ArrayLike, prompt_mass: ArrayLike) -> FloatArray:
    """System mass over prompt mass, elementwise, any shape; 0 where the prompt's is below 1e-9, NaN where either is."""
    system, prompt = np.asarray(system_mass, np.float64), np.asarray(prompt_mass, np.float64)
    empty = prompt < MIN_MASS
    return np.asarray(np.where(empty, system * 0.0, system / np.where(empty, 1.0, prompt)))


def instability(share: ArrayLike) -> FloatArray:
    """Population std (ddof=0) over the heads of share [steps, layers, heads] -> [steps, layers]; NaN if a head is NaN.

    The first head's share is subtracted first: that changes no std, and makes it exactly 0 where all heads are equal.
    """
    values = np.asarray(share, np.float64)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"share needs a last axis of at least one head, got shape {values.shape}")
    return np.asarray(np.std(values - values[..., :1], axis=-1, ddof=0))


def log_odds(share: ArrayLike) -> FloatArray:
    """Log-odds log(s / (1 - s)) of shares clipped to [1e-5, 1 - 1e-5], elementwise (any shape): -11.5 to 11.5."""
    clipped = np.clip(np.asarray(share, np.float64), MIN_SHARE, 1 - MIN_SHARE)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))


def covered(n_rows: int, windows: Sequence[int | None], system_start: int, prompt_len: int) -> BoolArray:
    """Whether each layer still sees the whole system span at each step -> bool [n_rows, layers].

    ``windows`` has a sliding window per layer, in tokens, None for full attention. With window W the query at position
    q attends the keys k with q - k < W, so the span is covered iff its first key is: q - W + 1 <= system_start, where
    q = prompt_len - 1 + t. ValueError for a window below 1.
    """
    if any(w is not None and w < 1 for w in windows):
        raise ValueError(f"a sliding window must be at least 1 token, got {list(windows)}")
    widths = np.array([np.inf if w is None else w for w in windows], np.float64)
    query = prompt_len - 1 + np.arange(n_rows)[:, None]
    return np.asarray(query - widths + 1 <= system_start)


def layer_range(n_layers: int, drop_shallow: float = DROP_SHALLOW, drop_deep: float = DROP_DEEP) -> tuple[int, int]:
    """Scored layers [s, e): s = min(max(2, int(L * drop_shallow)), L - 1), e = max(s + 1, int(L * (1 - drop_deep))).

    Never empty and never out of range, for one layer too. ValueError for fewer than one layer or a drop outside [0, 1).
    """
    if n_layers < 1:
        raise ValueError(f"a model needs at least 1 layer, got {n_layers}")
    for name, drop in (("drop_shallow", drop_shallow), ("drop_deep", drop_deep)):
        if not 0 <= drop < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {drop}")
    start = min(max(2, int(n_layers * drop_shallow)), n_layers - 1)
    return start, max(start + 1, int(n_layers * (1 - drop_deep)))


@dataclass(frozen=True, slots=True)
class Window:
    """Steps ``start`` to ``end``, 1-based and inclusive, written "1:12". ValueError unless 1 <= start <= end.

    ``Window(1, 0)``, written "none", is the window of a run that records step 0 alone: it has no step.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.end and not self.empty:
            raise ValueError(f"a window a:b needs 1 <= a <= b (step 0, the prefill, is never scored), got {self}")

    @property
    def empty(self) -> bool:
        """Whether the window has no step."""
        return (self.start, self.end) == (1, 0)

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read "a:b" or "none". ValueError for anything else."""
        if text.strip() == "none":
            return cls(1, 0)
        match = re.fullmatch(r"\s*(-?[0-9]+)\s*:\s*(-?[0-9]+)\s*", text)
        if match is None:
            raise ValueError(f"a window is two step numbers, as in 1:12, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return "none" if self.empty else f"{self.start}:{self.end}"


class Trims(TypedDict):
    """Fractions of the layers left out at either end."""

    drop_shallow: float
    drop_deep: float


@dataclass(frozen=True, slots=True)
class ScoreRange:
    """What a score is averaged over: a window of steps, and the layers that are left after trimming either end."""

    window: Window
    drop_shallow: float = DROP_SHALLOW
    drop_deep: float = DROP_DEEP

    @classmethod
    def within(
        cls,
        steps: int,
        window: Window | str | None = None,
        drop_shallow: float = DROP_SHALLOW,
        drop_deep: float = DROP_DEEP,
    ) -> ScoreRange:
        """The range of a run that records steps 0 to ``steps``; its window is 1 to ``steps`` by default.

        With steps 0 the window is empty. ValueError if steps, window and trims contradict each other.
        """
        if steps < 0:
            raise ValueError(f"steps must be at least 0 (the prompt's last token alone), not {steps}")
        parsed = Window.parse(window) if isinstance(window, str) else window or Window(1, steps)
        if parsed.empty and steps:
            raise ValueError(f"window {parsed} goes with steps 0, not {steps}: name steps to score, as in 1:{steps}")
        if parsed.end > steps:
            raise ValueError(
                f"window {parsed} reaches past step {steps}, the last one recorded; raise steps or shorten it"
            )
        layer_range(1, drop_shallow, drop_deep)
        return cls(parsed, drop_shallow, drop_deep)

    @property
    def trims(self) -> Trims:
        """The trims as keyword arguments of the functions below."""
        return {"drop_shallow": self.drop_shallow, "drop_deep": self.drop_deep}

    def score(self, instability: ArrayLike, n_steps: int) -> Score:
        """Score of instability [rows, layers], as :func:`score` has it."""
        return score(instability, self.window, n_steps=n_steps, **self.trims)

    def layers(self, n_layers: int) -> tuple[int, int]:
        """The scored layers [s, e) of a model, as :func:`layer_range` has them."""
        return layer_range(n_layers, self.drop_shallow, self.drop_deep)


def n_steps(n_answer_tokens: int, steps: int) -> int:
    """Index of the last recorded step of an answer: min(n_answer_tokens - 1, steps), at least 0.

    n tokens give steps 0..n-1, because the last one is never fed back; ``steps`` is the last step asked for. An answer
    of one token has step 0 only, and so has one of none (the prompt ran): it gives 0 too, and no window holds step 0.
    """
    return max(0, min(n_answer_tokens - 1, steps))


@dataclass(frozen=True, slots=True)
class Score:
    """A score, or None and the reason; ``n_scored`` is the number of the window's steps that went into it."""

    value: float | None
    reason: str | None
    n_scored: int


def score(
    instability: ArrayLike,
    window: Window,
    *,
    n_steps: int,
    drop_shallow: float = DROP_SHALLOW,
    drop_deep: float = DROP_DEEP,
) -> Score:
    """Mean of instability [rows, layers], NaN where not counted, over the window's steps and the trimmed layers.

    The plain mean over all counted (step, layer) cells: each cell weighs the same, so a step with fewer counted layers
    weighs less. An answer that ends inside the window is scored over the steps it has; ``n_scored`` is how many of them
    have a counted layer. If none: "no_window" if the window is empty, "answer_ended_before_window" if no step of it was
    recorded, else "window_lost_system_span". ValueError for a wrong shape or missing rows.
    """
    values = np.asarray(instability, np.float64)
    if values.ndim != 2:
        raise ValueError(f"instability must be [rows, layers], got shape {values.shape}")
    layers = slice(*layer_range(values.shape[1], drop_shallow, drop_deep))
    cells = values[_window_rows(len(values), window, n_steps), layers]
    counted = ~np.isnan(cells)
    if not len(cells):
        return Score(None, NO_WINDOW if window.empty else ANSWER_ENDED, 0)
    if not counted.any():
        return Score(None, LOST_SPAN, 0)
    return Score(float(cells[counted].mean()), None, int(counted.any(axis=1).sum()))


def head_agreement(
    share: ArrayLike,
    window: Window,
    *,
    n_steps: int,
    drop_shallow: float = DROP_SHALLOW,
    drop_deep: float = DROP_DEEP,
    counted: ArrayLike | None = None,
) -> float | None:
    """Mean pairwise Pearson r of the heads' shares over depth, mean over the window's steps: -1 to 1, or None.

    ``share`` is [rows, layers, heads]. At each step a head has the vector of its shares over the trimmed layers that
    count (``counted`` bool [rows, layers], None = all; a layer with a NaN head never counts). Constant heads (std below
    1e-6) are dropped; a step left with fewer than 2 layers or 2 heads is skipped; None if all are. ValueError for a
    wrong shape or missing rows.

    With z_h the centred vectors scaled to length 1, r_ij = z_i . z_j, so the mean over the H (H - 1) ordered pairs is
    (|sum_h z_h|^2 - H) / (H (H - 1)).
    """
    per_step = []
    for layers_heads, keep in zip(*_trimmed(share, window, n_steps, drop_shallow, drop_deep, counted), strict=True):
        vectors = layers_heads[keep]
        if len(vectors) < 2:
            continue
        centred = vectors - vectors.mean(axis=0)
        varying = centred[:, centred.std(axis=0) >= MIN_HEAD_STD]
        n_heads = varying.shape[1]
        if n_heads < 2:
            continue
        total = (varying / np.linalg.norm(varying, axis=0)).sum(axis=1)
        per_step.append((total @ total - n_heads) / (n_heads * (n_heads - 1)))
    return float(np.mean(per_step)) if per_step else None


def mean_share(
    share: ArrayLike,
    window: Window,
    *,
    n_steps: int,
    drop_shallow: float = DROP_SHALLOW,
    drop_deep: float = DROP_DEEP,
    counted: ArrayLike | None = None,
) -> float | None:
    """Mean of share [rows, layers, heads] over all heads of the (step, layer) cells that the score is the mean of.

    None if there are none. ``counted`` and errors as in :func:`head_agreement`.
    """
    cells, keep = _trimmed(share, window, n_steps, drop_shallow, drop_deep, counted)
    return float(cells[keep].mean()) if keep.any() else None


def window_mean(series: ArrayLike, window: Window, n_steps: int) -> float | None:
    """Mean of a per-step series [rows] over the window's steps that the answer has, leaving out NaN; None if none.

    For entropy (nats), top-1 probability, margin. ValueError for a wrong shape or missing rows.
    """
    values = np.asarray(series, np.float64)
    if values.ndim != 1:
        raise ValueError(f"series must be [rows], got shape {values.shape}")
    values = values[_window_rows(len(values), window, n_steps)]
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else None


def focus_heads(system_mass: ArrayLike, user_mass: ArrayLike) -> FloatArray:
    """system / (system + user), elementwise (any shape); 0 where the sum is below 1e-9, NaN where either is NaN.

    The quantity that Attention Tracker's focus score averages (Hung et al. 2024, arXiv 2411.00348), normalised as the
    authors' code does it: inst / (inst + data).
    """
    system = np.asarray(system_mass, np.float64)
    return share(system, system + np.asarray(user_mass, np.float64))


def focus(focus_heads: ArrayLike, heads: Iterable[tuple[int, int]] | None = None) -> float:
    """Attention Tracker's focus score: mean of ``focus_heads`` [layers, heads] over the chosen (layer, head) pairs.

    ``heads`` None means all. NaN if a chosen head is NaN. ValueError for a wrong shape, no pair, or a pair that does
    not exist; indices do not count from the end.
    """
    values = np.asarray(focus_heads, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"focus_heads must be [layers, heads], got shape {values.shape}")
    if heads is None:
        return float(values.mean())
    pairs = list(heads)
    if not pairs:
        raise ValueError("focus needs at least one (layer, head) pair")
    n_layers, n_heads = values.shape
    missing = [(layer, head) for layer, head in pairs if not (0 <= layer < n_layers and 0 <= head < n_heads)]
    if missing:
        raise ValueError(f"no such (layer, head): {missing}; there are {n_layers} layers of {n_heads} heads")
    return float(np.mean([values[layer, head] for layer, head in pairs]))


def _window_rows(n_rows: int, window: Window, n_steps: int) -> slice:
    """Rows of the window's steps that the answer has (possibly none)."""
    stop = max(window.start, min(window.end, n_steps) + 1)
    if window.start < stop and stop > n_rows:
        raise ValueError(f"window {window} with n_steps {n_steps} needs row {stop - 1}, but there are {n_rows} rows")
    return slice(window.start, stop)


def _trimmed(
    share: ArrayLike, window: Window, n_steps: int, drop_shallow: float, drop_deep: float, counted: ArrayLike | None
) -> tuple[FloatArray, BoolArray]:
    """Share of the window's steps and trimmed layers [steps, layers, heads], and which cells count [steps, layers]."""
    values = np.asarray(share, np.float64)
    if values.ndim != 3 or values.shape[2] == 0:
        raise ValueError(f"share must be [rows, layers, heads], got shape {values.shape}")
    cut = _window_rows(len(values), window, n_steps), slice(*layer_range(values.shape[1], drop_shallow, drop_deep))
    cells = values[cut]
    keep = ~np.isnan(cells).any(axis=2)
    if counted is not None:
        mask = np.asarray(counted, np.bool_)
        if mask.shape != values.shape[:2]:
            raise ValueError(f"counted must be [rows, layers] = {values.shape[:2]}, got shape {mask.shape}")
        keep = keep & mask[cut]
    return cells, np.asarray(keep)
