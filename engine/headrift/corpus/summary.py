"""The closing table: what became of the rows, and how well score and detector tell attacks from benign prompts.

Made from the parts and rejects on disk, so that a resumed run has the same one. Counts and means are over all rows;
medians, the figure and AUROC are over at most 20,000 rows per class, chosen by a hash: memory is flat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headrift.corpus.judging import GatedClass, Judged, print_gated
from headrift.corpus.rows import LABELS
from headrift.near_duplicates import NUMBERS
from headrift.runs.reading import HARD, group_prompts, hashes, mix, prompt_keys, read_batches, sketches
from headrift.signals import signals
from headrift.stats import TARGET_FPR, Bounds, Separation, separation
from headrift.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from headrift.calibration.bare import Judge

SCORE = "score (no score: lowest)"
SCORED = "score, scored rows only"
_CLASSES = (*LABELS, "unlabelled")
_MAX_CATEGORIES = 1000
_MAX_OF_CLASS = 20_000  # rows, or distinct prompts, kept per class
COLUMNS = ["label", "category", "score", "reason", "prompt_tokens", "answer_tokens", "n_steps", "group"]
_HASHES = ["prompt_hash", "answer_hash", "system_hash", "minhash"]
_OTHER = "(other)"
_OF_GROUP = ("order", "detector", "group", "text", "sketch")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Attacks against benign prompts, repeats counted once: how many, and how well each measure separates them.

    With a calibration the detector is the first measure. The score is not one if no row has it.
    """

    title: str
    n_attack: int
    n_benign: int
    measures: dict[str, Separation]

    @property
    def varying(self) -> dict[str, Separation]:
        """The measures without those that are the same for all prompts, which say nothing."""
        return {name: measure for name, measure in self.measures.items() if not measure.constant}

    def numbers(self) -> dict[str, Any]:
        """Return what run.json keeps."""
        measures = {name: measure.numbers() for name, measure in self.measures.items()}
        return {"title": self.title, "attack": self.n_attack, "benign": self.n_benign, "measures": measures}


class _Sample:
    """The rows with the smallest keys, at most _MAX_OF_CLASS of them; of rows with the same key the lowest `rank`.

    As keys are hashes, that is a fair sample, and the same however the rows were divided into batches.
    """

    def __init__(self) -> None:
        self._columns: dict[str, NDArray[Any]] = {}
        self.full = False

    def add(self, key: NDArray[np.uint64], rank: NDArray[np.uint64], **columns: NDArray[Any]) -> None:
        """Add rows: keys, ranks and columns [n]."""
        joined = {"key": key, "rank": rank, **columns}
        if self._columns:
            joined = {name: np.concatenate([self._columns[name], column]) for name, column in joined.items()}
        order = np.lexsort((joined["rank"], joined["key"]))
        first = order[np.unique(joined["key"][order], return_index=True)[1]]
        self.full |= len(first) > _MAX_OF_CLASS
        self._columns = {name: column[first[:_MAX_OF_CLASS]] for name, column in joined.items()}

    def in_order(self, name: str) -> NDArray[Any]:
        """Return a column, in the order in which the rows were added."""
        return self._columns[name][np.argsort(self._columns["order"])] if self._columns else np.array([])


@dataclass(slots=True)
class _Class:
    """What is kept of the rows of one class."""

    n: int = 0
    n_scored: int = 0
    n_early: int = 0
    score_sum: float = 0.0
    rows: _Sample = field(default_factory=_Sample)
    prompts: _Sample = field(default_factory=_Sample)
    groups: _Sample = field(default_factory=_Sample)  # a prompt of each, drawn by its hash


class Summary:
    """Counts and samples of a run's rows: `add` those in the parts, `reject` the others.

    An answer that does not reach `last_step`, the window's, stopped early. `detector` says what made the column
    `detector`, of a run with a calibration.
    """

    def __init__(self, last_step: int = 0, detector: str | None = None) -> None:
        self.no_score: Counter[str] = Counter()  # rows without a score, by reason
        self.rejects: Counter[str] = Counter()  # by reason
        self.judged: Judged | None = None  # what a calibration says of the rows
        self.gated: dict[str, GatedClass] | None = None  # what a gate did to each class
        self._last_step, self._detector = last_step, detector
        self._classes = {name: _Class() for name in _CLASSES}
        self._category_numbers: dict[str | None, int] = {None: 0}
        self._comparisons: list[Comparison] | None = None
        self._sketched = True  # whether the MinHash of every prompt is known

    @classmethod
    def of_folder(cls, folder: Path, last_step: int, judge: Judge | None = None) -> Summary:
        """Summarise all parts and rejects in a folder, whose parts were written with what judges, if anything."""
        summary = cls(last_step, None if judge is None else judge.label)
        for batch in read_batches(folder, [*COLUMNS, *_HASHES, "detector"], 1 << 16):
            summary.add(batch)
        summary.add_rejects(folder)
        if judge is not None:
            summary.judged = Judged(folder, judge, summary.prompt_values(), summary.group_values())
        return summary

    def add_rejects(self, folder: Path) -> None:
        for path in sorted(folder.glob("rejects-*.parquet")):
            for count in pq.read_table(path, columns=["reason"])["reason"].value_counts().to_pylist():
                self.reject(count["values"], count["counts"])

    def add(self, batch: pa.RecordBatch) -> None:
        """Add rows of a part, which have COLUMNS and, of a run with a calibration, `detector`."""
        named = {name: batch.column(name) for name in COLUMNS}
        labels = np.array(named["label"].fill_null("unlabelled").to_pylist())
        scores = named["score"].to_numpy(zero_copy_only=False).astype(np.float64)
        self.no_score.update(reason for reason in named["reason"].to_pylist() if reason is not None)
        group, prompt = hashes(batch, "group"), prompt_keys(batch)
        sketch = sketches(batch)
        self._sketched &= sketch is not None
        order = np.arange(self._n_added, self._n_added + len(labels), dtype=np.uint64)
        # A run that an earlier version made with a calibration was judged by its scores.
        values = batch.column("detector") if "detector" in batch.schema.names else named["score"]
        columns = {
            "order": order,
            "score": scores,
            "detector": values.to_numpy(zero_copy_only=False).astype(np.float64),
            "category": np.array([self._category_number(name) for name in named["category"].to_pylist()], np.int32),
            "group": group,
            "text": hashes(batch, "prompt_hash", "group"),
            "sketch": np.zeros((len(labels), NUMBERS), np.uint16) if sketch is None else sketch,
            **{length.name: named[length.name].to_numpy() for length in signals(length=True)},
        }
        for name, of_class in self._classes.items():
            selected = labels == name
            if not selected.any():
                continue
            scored = selected & ~np.isnan(scores)
            of_class.n += int(selected.sum())
            of_class.n_scored += int(scored.sum())
            of_class.n_early += int((columns["n_steps"][selected] < self._last_step).sum())
            of_class.score_sum += float(scores[scored].sum())
            kept = {name: column[selected] for name, column in columns.items()}
            of_row = {name: kept[name] for name in ("order", "score", "detector", "category")}
            of_class.rows.add(mix(order[selected]), order[selected], **of_row)
            of_class.prompts.add(prompt[selected], order[selected], **kept)
            group_key, of_group = mix(group[selected]), {name: kept[name] for name in _OF_GROUP}
            of_class.groups.add(group_key, prompt[selected], **of_group)
        self._comparisons = None

    def _category_number(self, category: str | None) -> int:
        numbers = self._category_numbers
        if category not in numbers and len(numbers) >= _MAX_CATEGORIES:
            hard = category is not None and category.startswith(HARD)
            category = f"{HARD} {_OTHER}" if hard else _OTHER
        return numbers.setdefault(category, len(numbers))

    def reject(self, reason: str, n: int = 1) -> None:
        """Count rows that went into the rejects."""
        self.rejects[reason] += n

    @property
    def _n_added(self) -> int:
        return sum(of_class.n for of_class in self._classes.values())

    @property
    def rows(self) -> int:
        """All rows, rejects included."""
        return self._n_added + self.rejects.total()

    @property
    def scored(self) -> int:
        return sum(of_class.n_scored for of_class in self._classes.values())

    @property
    def sampled(self) -> str:
        """If not every row is kept: how many are, as words that follow others."""
        full = any(of_class.rows.full or of_class.prompts.full for of_class in self._classes.values())
        return f", from {_MAX_OF_CLASS:,} rows per class" if full else ""

    def numbers(self) -> dict[str, Any]:
        """Return what run.json keeps."""
        return {
            "counts": self.counts(),
            "classes": self.by_class(),
            "comparisons": [comparison.numbers() for comparison in self.comparisons()],
            **({} if self.judged is None else {"judged": self.judged.numbers()}),
            **({} if self.gated is None else {"gate": {name: asdict(gated) for name, gated in self.gated.items()}}),
        }

    def counts(self) -> dict[str, Any]:
        """Count all rows, those with a score and, by reason, those without one and those rejected."""
        reasons = {"no_score": dict(self.no_score), "rejected": dict(self.rejects)}
        return {"rows": self.rows, "scored": self.scored, **reasons}

    def _with_rows(self) -> list[tuple[str, _Class]]:
        return [(name, of_class) for name, of_class in self._classes.items() if of_class.n]

    def by_class(self) -> dict[str, dict[str, float | int | None]]:
        """Describe each class with rows: attack, benign, unlabelled.

        Returns `n`; as fractions of it `coverage` (rows with a score) and `early` (answers that end before the window);
        `mean` and `median` score, None without scores.
        """
        classes: dict[str, dict[str, float | int | None]] = {}
        for name, of_class in self._with_rows():
            scores = of_class.rows.in_order("score")
            valid = scores[~np.isnan(scores)]
            classes[name] = {
                "n": of_class.n,
                "coverage": of_class.n_scored / of_class.n,
                "early": of_class.n_early / of_class.n,
                "mean": of_class.score_sum / of_class.n_scored if of_class.n_scored else None,
                "median": float(np.median(valid)) if len(valid) else None,
            }
        return classes

    def prompt_scores(self, name: str = "score") -> dict[str, NDArray[np.float64]]:
        """Return the scores, or another column, of each class's distinct prompts, NaN without one.

        Classes without rows are left out. Exact repeats count once, the first of them.
        """
        return {label: of_class.prompts.in_order(name) for label, of_class in self._with_rows()}

    def prompt_values(self) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Return the detector's values of each class's distinct prompts, NaN without one, and their groups."""
        return {
            label: (prompts.in_order("detector"), self._groups(prompts.in_order))
            for label, of_class in self._with_rows()
            for prompts in [of_class.prompts]
        }

    def _groups(self, column: Callable[[str], NDArray[Any]]) -> NDArray[np.int64]:
        """The groups of prompts, given their columns: their own or, if there are many without one, near duplicates."""
        group, text = (np.unique(column(name), return_inverse=True)[1] for name in ("group", "text"))
        return group_prompts(group, text, lambda rows: column("sketch")[rows] if self._sketched else None)[0]

    def group_values(self) -> dict[str, NDArray[np.float64]]:
        """Return the detector's values of one prompt of each group, by class; NaN without one."""
        values = {}
        for label, of_class in self._with_rows():
            column = of_class.groups.in_order
            values[label] = column("detector")[np.unique(self._groups(column), return_index=True)[1]]
        return values

    def by_category(self, column: str = "score") -> dict[tuple[str, str], NDArray[np.float64]]:
        """Return the scores, or `detector`, of each class and category with rows, in order of first appearance.

        NaN if a row has none.
        """
        groups = {}
        for name, of_class in self._with_rows():
            scores, categories = (of_class.rows.in_order(one) for one in (column, "category"))
            for category, number in self._category_numbers.items():
                in_category = scores[categories == number]
                if len(in_category):
                    groups[name, category or ""] = in_category
        return groups

    def samples(self) -> dict[str, NDArray[np.int64]]:
        """Return the row numbers, from 0, of each class's distinct prompts, as the comparisons use them."""
        return {name: one.prompts.in_order("order").astype(np.int64) for name, one in self._with_rows()}

    def comparisons(self) -> list[Comparison]:
        """Compare attacks with all benign prompts and, if only some of these are hard, with those that are not.

        Exact repeats with the same label count once, the first of them. Empty without both classes.
        """
        if self._comparisons is None:
            hard = {number for name, number in self._category_numbers.items() if name and name.startswith(HARD)}
            is_hard = np.isin(self._classes["benign"].prompts.in_order("category"), list(hard))
            comparisons = [self._compare("Attack against benign", np.ones(len(is_hard), np.bool_))]
            if is_hard.any() and not is_hard.all():
                comparisons.append(self._compare("Attack against benign that is not hard", ~is_hard))
            self._comparisons = [comparison for comparison in comparisons if comparison is not None]
        return self._comparisons

    def _compare(self, title: str, benign: NDArray[np.bool_]) -> Comparison | None:
        """Compare all attacks with some of the benign prompts."""
        attacks, others = self._classes["attack"].prompts, self._classes["benign"].prompts

        def both(name: str) -> NDArray[Any]:
            return np.concatenate([attacks.in_order(name), others.in_order(name)[benign]])

        n_attack, n_benign = len(attacks.in_order("order")), int(benign.sum())
        if not n_attack or not n_benign:
            return None
        attack = np.arange(n_attack + n_benign) < n_attack
        groups, scores = self._groups(both), both("score")
        measures, valid = {}, ~np.isnan(scores)
        if self._detector is not None:
            measures[f"detector: {self._detector}"] = separation(both("detector"), attack, groups)
        if valid.any():
            measures[SCORE] = separation(scores, attack, groups)
        if 0 < attack[valid].sum() < valid.sum():
            common = np.unique(groups[valid], return_inverse=True)[1]
            measures[SCORED] = separation(scores[valid], attack[valid], common)
        for length in signals(length=True):
            measures[length.label] = separation(both(length.name).astype(np.float64), attack, groups)
        return Comparison(title, n_attack, n_benign, measures)

    def print(self, console: Console, *, rows: int, start_seconds: float, score_seconds: float) -> None:
        """Print the tables. `rows` is how many the engine answered this time; starting and answering took seconds."""
        prefill_only = 0 < self._n_added == self.no_score["no_window"]
        speed = f"{rows / score_seconds:.1f} prompts/s for {score_seconds:.1f} s" if rows else "none scored now"
        lines = [("rows", self.rows, f"{speed}, after {start_seconds:.0f} s to start" if start_seconds else "")]
        if prefill_only:
            lines.append(("measured", self._n_added, "at step 0 alone, which has no score"))
        else:
            lines += [("scored", self.scored, ""), ("no score", self.no_score.total(), _reasons(self.no_score))]
        lines.append(("rejected", self.rejects.total(), _reasons(self.rejects)))
        for name, n, more in lines:
            console.print(f"{name:<10}{n:>9,}  {more}".rstrip(), markup=False, highlight=False)
        classes = []
        for name, values in self.by_class().items():
            fractions = (f"{values[key]:.1%}" for key in ("coverage", "early"))
            scores = ("" if (value := values[key]) is None else f"{value:.4f}" for key in ("mean", "median"))
            classes.append((name, f"{values['n']:,}", *(() if prefill_only else (*fractions, *scores))))
        if classes:
            of_scores = () if prefill_only else ("with score", "stop early", "mean score", "median")
            print_table(console, ("", "rows", *of_scores), classes)
        if self.gated is not None:
            print_gated(console, self.gated)
        compared = [one for one in self.comparisons() if self.gated is None and one.varying]
        for comparison in compared:
            title = f"\n{comparison.title}: {comparison.n_attack:,} against {comparison.n_benign:,}"
            console.print(title, markup=False, highlight=False)
            names = ("", "AUROC", "95% interval", f"TPR at {TARGET_FPR:.0%} FPR", "95% interval")
            measures = [
                (name, f"{one.auroc:.3f}", _range(one.auroc_interval), f"{one.tpr:.3f}", _range(one.tpr_interval))
                for name, one in comparison.varying.items()
            ]
            print_table(console, names, measures)
        notes = []
        if compared:
            what = "score" if self._detector is None else "value"
            notes.append(
                f"Higher counts as attack, repeats count once, rows without a {what} are never flagged{self.sampled}."
            )
        if prefill_only and self._detector is None:
            notes.append("No score, no scores.png: `headrift calibrate` makes a detector of what was recorded.")
        for note in notes:
            console.print(f"\n{note}", markup=False, highlight=False)
        if self.judged is not None:
            self.judged.print(console, drift_only=self.gated is not None)


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {n:,}" for reason, n in counts.most_common())


def _range(interval: Bounds | None) -> str:
    return "too few" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}"
