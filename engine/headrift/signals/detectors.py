"""Detectors: what makes one number of a prompt, higher for attacks, as calibration has learned it.

- `Directed`: a signal as it is, or with its sign turned.
- `ChosenHeads`: focus over the heads that attacks move most (Attention Tracker, Hung et al. 2024, arXiv 2411.00348).
- `Readout`: a linear readout of the features (L2 logistic regression): log-odds of an attack.
- `Novelty`: how far the features are from benign ones (Mahalanobis distance), for which no attack is needed.

All are plain JSON: numbers and names; loading one runs no code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from headrift.signals.features import Prompts, counted_layers, features
from headrift.stats import Bools, Floats, Ints

Number = Annotated[float, Field(allow_inf_nan=False)]
Reads = Literal["values", "logit_shares", "focus_heads"]  # what of a prompt a detector reads, see Prompts
INVERSE_PENALTIES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # of readouts (C): the best by inner cross-validation
FEWEST_FOR_READOUT = 10  # prompts of a class
FEWEST_NORMAL = 30  # prompts for moments of one's own
_TRIM = 0.1  # fraction of the prompts that robust moments leave out at either end
# Standard deviation of a normal distribution over that of its middle 80%: makes trimmed deviations comparable.
_TRIMMED_SPREAD = 1.5115
_LARGEST_N = 4
_BEST = 0.1  # the fraction of heads that is chosen if no head passes
_DIGITS = 7


class NotEnoughError(ValueError):
    """A detector cannot be learned from these prompts. The message says what is missing."""


@dataclass(frozen=True, slots=True)
class Training:
    """What a detector is learned from; arrays are [n].

    Attributes:
        attack: which prompts are attacks.
        source: number of each prompt's source; classes and sources weigh alike.
        fold: inner folds that settings are chosen by, groups whole; sources, if there are three or more.
        windowed: whether features of the window are used.
        own_normal: whether features are standardised on each source's own benign prompts, because moments of one's own
            traffic will replace them.
    """

    prompts: Prompts
    attack: Bools
    source: Ints
    fold: Ints
    windowed: bool = False
    own_normal: bool = False

    def take(self, index: Ints) -> Training:
        """Some of the prompts."""
        columns = {name: getattr(self, name)[index] for name in ("attack", "source", "fold")}
        return replace(self, prompts=self.prompts.take(index), **columns)


class Directed(BaseModel, extra="forbid", frozen=True):
    """A signal times `direction`: 1 if attacks have the higher values, -1 the lower."""

    reads: ClassVar[Reads] = "values"
    kind: Literal["directed"] = "directed"
    signal: str
    direction: Literal[1, -1]

    def values(self, prompts: Prompts) -> Floats:
        """[n], NaN for none."""
        return self.direction * prompts.values[self.signal]


class ChosenHeads(BaseModel, extra="forbid", frozen=True):
    """Minus the mean focus over the chosen (layer, head) pairs at step 0; `n` is that of `choose_heads`."""

    reads: ClassVar[Reads] = "focus_heads"
    kind: Literal["chosen_heads"] = "chosen_heads"
    heads: list[tuple[int, int]]
    n: int | None

    def values(self, prompts: Prompts) -> Floats:
        """[n], NaN for none."""
        if prompts.focus_heads is None:  # no prompt has a user turn
            return np.full(len(prompts), np.nan)
        layer, head = np.array(self.heads).T
        return -prompts.focus_heads[:, layer, head].astype(np.float64).mean(axis=1)


class Moments(BaseModel, extra="forbid", frozen=True):
    """Mean and spread of each feature [d], and how many prompts they are of."""

    mean: list[Number]
    spread: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    n: int
    trimmed: float = 0.0  # fraction of the prompts left out at either end

    @classmethod
    def measure(cls, matrix: Floats, *, robust: bool = False) -> Moments:
        """Moments of features [n, d], leaving out NaN.

        robust: without the highest and the lowest tenth of each feature, so that a few attacks among the prompts
        do not move them.
        """
        n = int((~np.isnan(matrix[:, 0])).sum())
        if robust:
            low, high = np.nanquantile(matrix, (_TRIM, 1 - _TRIM), axis=0)
            matrix = np.where((matrix >= low) & (matrix <= high), matrix, np.nan)
        mean = np.nanmean(matrix, axis=0)
        spread = np.nanstd(matrix, axis=0) * (_TRIMMED_SPREAD if robust else 1.0)
        spread = np.where(spread > 1e-6, spread, 1.0)  # a feature that does not vary says nothing
        return cls(mean=_rounded(mean), spread=_rounded(spread), n=n, trimmed=_TRIM if robust else 0.0)

    def standardise(self, matrix: Floats) -> Floats:
        """Features in spreads from the mean; 0, the mean, for the window's if the answer ended before it."""
        scaled = (matrix - np.array(self.mean)) / np.array(self.spread)
        missing = np.isnan(scaled)
        return np.where(missing & ~missing[:, -1:], 0.0, scaled)


class _OnFeatures(BaseModel, extra="forbid", frozen=True):
    """What readout and novelty share: the layers that count, and the moments that standardise their features."""

    reads: ClassVar[Reads] = "logit_shares"
    shape: tuple[int, int]  # layers, heads
    layers: list[int]
    windowed: bool
    moments: Moments

    @model_validator(mode="after")
    def _check(self) -> Self:
        layers, heads = self.shape
        n = len(self.layers)
        d = n * heads * (1 + self.windowed) + n
        sizes = {"mean": len(self.moments.mean), "spread": len(self.moments.spread), **self._sizes(d)}
        wrong = [name for name, size in sizes.items() if size != d]
        if wrong or not n or not all(0 <= layer < layers for layer in self.layers):
            raise ValueError(f"{wrong[0] if wrong else 'layers'} does not fit {n} layers of {heads} heads")
        return self

    def _sizes(self, d: int) -> dict[str, int]:
        """Sizes of further lists that must be d long."""
        return {}

    def standardised(self, prompts: Prompts) -> Floats:
        """Features [n, d] of prompts as the detector takes them; NaN throughout if a prompt lacks a layer."""
        return self.moments.standardise(features(prompts, np.array(self.layers), windowed=self.windowed))

    def by_head(self, terms: Floats) -> Floats:
        """Terms of the features [..., d] as [..., layers, heads]; a layer's own is spread over its heads."""
        (_, n_heads), n = self.shape, len(self.layers)
        size = n * n_heads
        heads = terms[..., :size].reshape(*terms.shape[:-1], n, n_heads).copy()
        if self.windowed:
            heads += terms[..., size : 2 * size].reshape(heads.shape)
        heads += terms[..., -n:, None] / n_heads
        result = np.zeros((*terms.shape[:-1], *self.shape))
        result[..., self.layers, :] = heads
        return result


class Readout(_OnFeatures, frozen=True):
    """Log-odds of an attack: coefficients times standardised features, plus the intercept.

    Attributes:
        inverse_penalty: C of the L2 penalty, chosen by inner cross-validation.
        head_map: [layers, heads] of what tells the classes apart: coefficient x (attack mean - benign mean).
    """

    kind: Literal["readout"] = "readout"
    coefficients: list[Number]
    intercept: Number
    inverse_penalty: float
    head_map: list[list[float]]

    def _sizes(self, d: int) -> dict[str, int]:
        return {"coefficients": len(self.coefficients)}

    def values(self, prompts: Prompts) -> Floats:
        """[n], NaN for none."""
        return self.standardised(prompts) @ np.array(self.coefficients) + self.intercept

    def contributions(self, prompts: Prompts) -> Floats:
        """What each head adds to the log-odds [n, layers, heads]; with the intercept they sum to `values`."""
        return self.by_head(self.standardised(prompts) * np.array(self.coefficients))

    def with_normal(self, prompts: Prompts) -> Readout:
        """The readout with robust moments of other prompts, as one's own traffic is, in place of those learned.

        Raises:
            NotEnoughError: Fewer than 30 prompts have the features.
        """
        matrix = features(prompts, np.array(self.layers), windowed=self.windowed)
        matrix = matrix[~np.isnan(matrix[:, -1])]
        if len(matrix) < FEWEST_NORMAL:
            raise NotEnoughError(f"moments take at least {FEWEST_NORMAL} prompts, and {len(matrix)} have shares")
        return self.model_copy(update={"moments": Moments.measure(matrix, robust=True)})


class Novelty(_OnFeatures, frozen=True):
    """Mahalanobis distance of the standardised features to benign ones, with the covariance of Ledoit and Wolf (2004).

    Attributes:
        precision: the inverse covariance's upper triangle, row by row.
    """

    kind: Literal["novelty"] = "novelty"
    precision: list[Number]

    def _sizes(self, d: int) -> dict[str, int]:
        return {"precision": d if len(self.precision) == d * (d + 1) // 2 else 0}

    def values(self, prompts: Prompts) -> Floats:
        """[n], NaN for none."""
        matrix = self.standardised(prompts)
        return np.sqrt(np.maximum(np.einsum("nd,dn->n", matrix, self._times_precision(matrix.T)), 0.0))

    def contributions(self, prompts: Prompts) -> Floats:
        """What each head adds to the squared distance [n, layers, heads]."""
        matrix = self.standardised(prompts)
        return self.by_head(self._times_precision(matrix.T).T * matrix)

    @cached_property
    def _times_precision(self) -> Callable[[Floats], Floats]:
        """The inverse covariance times [d, n]. It takes some 30 ms to make; kept as an array it would break `==`."""
        d = len(self.moments.mean)
        upper = np.zeros((d, d))
        upper[np.triu_indices(d)] = self.precision
        return partial(np.matmul, upper + np.triu(upper, 1).T)


Detector = Annotated[Directed | ChosenHeads | Readout | Novelty, Field(discriminator="kind")]
AnyDetector = Directed | ChosenHeads | Readout | Novelty


def learn_direction(name: str, training: Training, expected: Literal[1, -1] = 1) -> Directed:
    """The direction in which a signal tells attacks: by its AUROC among prompts that have it.

    expected: the direction to take if one of the classes is missing.
    """
    return Directed(signal=name, direction=direction_of(training.prompts.values[name], training.attack, expected))


def direction_of(values: Floats, attack: Bools, expected: Literal[1, -1] = 1) -> Literal[1, -1]:
    """1 if attacks have the higher values [n], NaN left out, by their AUROC; -1 if the lower."""
    from sklearn.metrics import roc_auc_score

    known = ~np.isnan(values)
    if not attack[known].any() or attack[known].all():
        return expected
    return 1 if roc_auc_score(attack[known], values[known]) >= 0.5 else -1


def learn_heads(training: Training) -> ChosenHeads:
    """The heads whose focus attacks move most, see `choose_heads`."""
    focus_heads = training.prompts.focus_heads
    assert focus_heads is not None
    known = ~np.isnan(focus_heads).any(axis=(1, 2))
    _check_classes(training.attack[known])
    n, chosen = choose_heads(focus_heads[known], training.attack[known])
    return ChosenHeads(heads=[(int(layer), int(head)) for layer, head in np.argwhere(chosen)], n=n)


def choose_heads(focus_heads: NDArray[np.floating], attack: Bools) -> tuple[int | None, Bools]:
    """Heads with mean_clean - mean_attack - n * (std_clean + std_attack) > 0, as Attention Tracker chooses them.

    focus_heads: [samples, layers, heads] at step 0, no NaN. n is the largest from 4 to 1 that any head passes; if none
    does, the best tenth of the heads (at least one) for n = 1 is chosen, and n is None. Returns n and bool [layers,
    heads].
    """
    clean, attacked = (focus_heads[mask].astype(np.float64) for mask in (~attack, attack))
    shift = clean.mean(axis=0) - attacked.mean(axis=0)
    spread = clean.std(axis=0) + attacked.std(axis=0)
    for n in range(_LARGEST_N, 0, -1):
        passed = shift - n * spread > 0
        if passed.any():
            return n, passed
    margin = shift - spread
    best = np.argsort(-margin, axis=None, kind="stable")[: max(1, int(margin.size * _BEST))]
    chosen = np.zeros(margin.size, np.bool_)
    chosen[best] = True
    return None, chosen.reshape(margin.shape)


def learn_readout(training: Training) -> Readout:
    """Fit the readout; the penalty is the one with the highest mean AUROC within inner folds.

    Raises:
        NotEnoughError: A class has fewer than 10 prompts with shares, or no layer counts in all of them.
    """
    from threadpoolctl import threadpool_limits

    training, layers, matrix = _with_features(training)
    _check_classes(training.attack)
    moments = Moments.measure(matrix)
    if training.own_normal:
        standardised = np.full_like(matrix, np.nan)
        for number in np.unique(training.source):
            own = training.source == number
            normal = own & ~training.attack
            standardised[own] = (Moments.measure(matrix[normal]) if normal.any() else moments).standardise(matrix[own])
    else:
        standardised = moments.standardise(matrix)
    weight = class_weights(training)
    with threadpool_limits(1 if len(matrix) < 2_000 else None, "blas"):  # more threads do not pay for small fits
        inverse_penalty = _choose_penalty(standardised, training, weight)
        small, back = _fewer_columns(standardised)
        coefficients, intercept = _fit(small, training.attack, weight, inverse_penalty)
        coefficients = back @ coefficients
    shift = standardised[training.attack].mean(axis=0) - standardised[~training.attack].mean(axis=0)
    assert training.prompts.logit_shares is not None
    readout = Readout(
        shape=training.prompts.logit_shares.shape[2:],
        layers=layers.tolist(),
        windowed=training.windowed,
        moments=moments,
        coefficients=_rounded(coefficients),
        intercept=intercept,
        inverse_penalty=inverse_penalty,
        head_map=[],
    )
    return readout.model_copy(update={"head_map": [_rounded(row) for row in readout.by_head(coefficients * shift)]})


def learn_novelty(training: Training) -> Novelty:
    """Fit the distance to the benign prompts.

    Raises:
        NotEnoughError: Fewer than 10 benign prompts have shares, or no layer counts in all of them.
    """
    from sklearn.covariance import ledoit_wolf

    benign = training.take(np.flatnonzero(~training.attack))
    benign, layers, matrix = _with_features(benign)
    if len(matrix) < FEWEST_FOR_READOUT:
        raise NotEnoughError(f"novelty takes {FEWEST_FOR_READOUT} benign prompts with shares, and {len(matrix)} have")
    moments = Moments.measure(matrix)
    precision = np.linalg.inv(ledoit_wolf(moments.standardise(matrix), assume_centered=True)[0])
    assert benign.prompts.logit_shares is not None
    return Novelty(
        shape=benign.prompts.logit_shares.shape[2:],
        layers=layers.tolist(),
        windowed=training.windowed,
        moments=moments,
        precision=_rounded(precision[np.triu_indices(len(precision))]),
    )


def _with_features(training: Training) -> tuple[Training, Ints, Floats]:
    """The prompts that have shares, the layers that count in all of them, and their features."""
    assert training.prompts.logit_shares is not None
    layers = counted_layers(training.prompts)
    if not len(layers):
        raise NotEnoughError("no layer counts in every prompt: their sliding windows lose the system prompt")
    matrix = features(training.prompts, layers, windowed=training.windowed)
    known = np.flatnonzero(~np.isnan(matrix[:, -1]))
    return training.take(known), layers, matrix[known]


def _check_classes(attack: Bools) -> None:
    fewest = min(int(attack.sum()), int((~attack).sum()))
    if fewest < FEWEST_FOR_READOUT:
        raise NotEnoughError(f"it takes {FEWEST_FOR_READOUT} attacks and as many benign prompts; there are {fewest}")


def class_weights(training: Training) -> Floats:
    """Weights [n]: both classes have the same total, and within a class all sources."""
    weight = np.zeros(len(training.attack))
    for label in (True, False):
        in_class = training.attack == label
        sources = np.unique(training.source[in_class])
        for number in sources:
            own = in_class & (training.source == number)
            weight[own] = len(weight) / (2 * len(sources) * own.sum())
    return weight


def _choose_penalty(matrix: Floats, training: Training, weight: Floats) -> float:
    """The C with the highest mean AUROC within the inner folds that have both classes; the smallest of equals.

    Ranks within a fold are what a threshold set on new benign prompts uses. A fold of a source that nothing was learned
    from has another mean, which a log-loss would punish instead.
    """
    from sklearn.metrics import roc_auc_score

    aurocs = np.zeros(len(INVERSE_PENALTIES))
    for number in np.unique(training.fold):
        inside, others = training.fold == number, training.fold != number
        if any(len(np.unique(training.attack[part])) < 2 for part in (inside, others)):
            continue
        small, back = _fewer_columns(matrix[others])
        held_out = matrix[inside] @ back
        for place, inverse_penalty in enumerate(INVERSE_PENALTIES):
            coefficients, _ = _fit(small, training.attack[others], weight[others], inverse_penalty)
            aurocs[place] += roc_auc_score(training.attack[inside], held_out @ coefficients)
    return INVERSE_PENALTIES[int(aurocs.argmax())]


def _fewer_columns(matrix: Floats) -> tuple[Floats, Floats]:
    """A matrix [n, min(n, d)] for which an L2 penalty means the same as for matrix [n, d], and [d, min(n, d)] back."""
    n, d = matrix.shape
    if n >= d:
        return matrix, np.eye(d)
    left, scale, right = np.linalg.svd(matrix, full_matrices=False)
    return left * scale, right.T


def _fit(matrix: Floats, attack: Bools, weight: Floats, inverse_penalty: float) -> tuple[Floats, float]:
    """Coefficients and intercept of an L2 logistic regression."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=inverse_penalty, solver="newton-cholesky", max_iter=100)
    model.fit(matrix, attack, sample_weight=weight)
    return model.coef_[0], float(model.intercept_[0])


def _rounded(values: Floats) -> list[float]:
    """Values with as many digits as a float32 has."""
    with np.errstate(divide="ignore"):
        scale = 10.0 ** (_DIGITS - 1 - np.floor(np.log10(np.abs(values))))
    return np.where(values == 0, 0.0, np.round(values * np.where(values == 0, 1.0, scale)) / scale).tolist()
