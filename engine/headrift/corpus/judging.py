"""What a calibration says of a run's rows at the end, and what a gate did with them.

Each row's `flagged`, `p_value` and `blocked` are in the parts, which are read again: memory is flat in the number of
rows, but for those on the review list. Rates are of distinct prompts (at most 20,000 of a class, sampled).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from headrift.calibration.artifact import Drift, cutoff, drift
from headrift.calibration.bare import NO_PROMISE, BareThreshold
from headrift.calibration.thresholds import CalibrationError
from headrift.runs.folder import atomic_path
from headrift.runs.parts import column_types
from headrift.runs.reading import floats, hashes, prompt_keys, read_batches
from headrift.stats import rate_interval
from headrift.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from headrift.calibration.artifact import Calibration
    from headrift.calibration.bare import Judge

LIST = "flagged-fdr.parquet"
FDR = 0.1  # fraction of the prompts on the review list that may be benign, on average
_MOST_TOLD = 20  # hashes of new system prompts in run.json
_KEYS = ["group", "prompt_hash", "answer_hash", "system_hash"]
_ROWS_AT_ONCE = 8_000_000  # of the review list, 24 bytes each
_LIST_COLUMNS = ["entry", "id", "source", "row", "score", "detector", "p_value"]
_CLASSES = {"attack": "attack (found: TPR)", "benign": "benign (flagged: FPR)", "unlabelled": "unlabelled"}


def check(calibration: Calibration, identity: Mapping[str, Any], *, anyway: bool) -> list[str]:
    """Name, in words, what differs between the calibration's model and the one in a run's identity.

    Before the engine has started, only what is known of it is compared. CalibrationError if anything differs, unless
    the calibration is to be used anyway.
    """
    known = {"fingerprint": identity["model"]["fingerprint"], **(identity["engine"] or {})}
    same = {name: value for name, value in known.items() if name in type(calibration.model).model_fields}
    differs = calibration.model.differences(calibration.model.model_copy(update=same))
    differs += calibration.other_mode(identity["settings"]["replay"])
    if differs and not anyway:
        verb = "differs" if len(differs) == 1 else "differ"
        raise CalibrationError(
            f"--calibration is for something else than this run: {' and '.join(differs)} {verb}. Calibrate on runs of "
            "this model and template; or give --calibration-anyway, and its promise does not hold"
        )
    return differs


@dataclass(frozen=True, slots=True)
class Rate:
    """k of n distinct prompts, with the 95% interval of the rate over groups (`stats.rate_interval`)."""

    k: int
    n: int
    rate: float
    interval: tuple[float, float]

    @classmethod
    def from_hits(cls, hits: ArrayLike, group: NDArray[np.int64]) -> Rate:
        """Of prompts [n] that are hits, and their groups."""
        hits = np.asarray(hits, np.bool_)
        return cls(int(hits.sum()), len(hits), float(hits.mean()), rate_interval(hits, group))

    @property
    def cells(self) -> tuple[str, str]:
        return f"{self.rate:.1%}", f"{self.interval[0]:.1%}-{self.interval[1]:.1%}"


class Judged:
    """What a calibration, or a bare threshold, says of the rows in a folder's parts, which have its columns.

    Attributes:
        flagged: By class: rows, flagged rows, and the rate of flagged prompts.
        listed: The review list (`ReviewList`).
        drift: Of the scores of the class `drift_of`; None without benign and unlabelled rows, or a calibration.
        new_rows, new_system_prompts: Rows with system prompts that the calibration does not know, and the hashes of the
            first of these, 20 at most.
    """

    def __init__(
        self,
        folder: Path,
        judge: Judge,
        prompts: Mapping[str, tuple[NDArray[np.float64], NDArray[np.int64]]],
        group_values: Mapping[str, NDArray[np.float64]],
    ) -> None:
        """Judge the rows.

        Args:
            folder: With the parts.
            judge: What judges.
            prompts: By class, the detector's values of distinct prompts and their groups.
            group_values: By class, the value of one prompt of each group.
        """
        self._folder, self._judge = folder, judge
        rows, flagged = Counter[str](), Counter[str]()
        known = None if isinstance(judge, BareThreshold) else judge.data.system_prompts
        self.new_rows, new = 0, dict[str, None]()
        for batch in read_batches(folder, ["label", "flagged", "system_hash"]):
            if known is not None:
                systems = batch["system_hash"].drop_null()
                systems = systems.filter(pc.invert(pc.is_in(systems, value_set=pa.array(known, pa.string()))))
                self.new_rows += len(systems)
                if len(new) < _MOST_TOLD:
                    new |= dict.fromkeys(systems.unique().to_pylist())
            labels = batch["label"].fill_null("unlabelled")
            rows.update(labels.to_pylist())
            flagged.update(labels.filter(batch["flagged"]).to_pylist())
        self.flagged = {}
        for name, (values, groups) in prompts.items():
            rate = Rate.from_hits(judge.apply(values).flagged, groups)
            self.flagged[name] = rows[name], flagged[name], rate
        bare = isinstance(judge, BareThreshold)  # without p-values
        self.listed = ReviewList(0, 0, None) if bare else ReviewList.of_folder(folder, rows.total())
        self.drift_of: Literal["benign", "unlabelled"] = "benign" if "benign" in prompts else "unlabelled"
        self.drift: Drift | None = None
        if self.drift_of in group_values and not isinstance(judge, BareThreshold):
            self.drift = drift(group_values[self.drift_of], judge, self.drift_of)
        self.new_system_prompts = list(new)[:_MOST_TOLD]

    def numbers(self) -> dict[str, Any]:
        """Return what run.json keeps."""
        by_class = {
            name: {
                "rows": rows,
                "flagged": flagged,
                "prompts": prompts.n,
                "prompts_flagged": prompts.k,
                "interval": prompts.interval,
                "rate": prompts.rate,
            }
            for name, (rows, flagged, prompts) in self.flagged.items()
        }
        if isinstance(self._judge, BareThreshold):
            return {"flagged": by_class, "warning": NO_PROMISE}
        listed = {"rate": FDR, **asdict(self.listed), "file": LIST}
        moved = None if self.drift is None else {"of": self.drift_of, **asdict(self.drift)}
        new = {"new_system_prompts": {"rows": self.new_rows, "hashes": self.new_system_prompts}}
        return {"flagged": by_class, "fdr_list": listed, "drift": moved, **new}

    def write_list(self) -> None:
        """Write the review list to flagged-fdr.parquet, see `ReviewList`. OSError if that fails."""
        types = {**column_types(), "entry": pa.int64(), "detector": pa.float64(), "p_value": pa.float64()}
        schema = pa.schema({name: types[name] for name in _LIST_COLUMNS})
        table, cutoff = schema.empty_table(), self.listed.highest_p_value
        if cutoff is not None:
            parts = []
            for batch in read_batches(self._folder, [*_LIST_COLUMNS[1:], *_KEYS]):
                on_list = batch.filter(pc.less_equal(batch["p_value"], cutoff))
                if "detector" not in on_list.schema.names:  # parts that an earlier version wrote
                    on_list = on_list.append_column("detector", on_list["score"])
                keys = prompt_keys(on_list)
                parts.append(on_list.select(_LIST_COLUMNS[1:]).append_column("key", pa.array(keys)))
            table = pa.Table.from_batches([part for part in parts if len(part)]).combine_chunks()
            # The most suspicious prompt first, its rows beneath each other.
            keys = table["key"].to_numpy()
            _, first, entry = np.unique(keys, return_index=True, return_inverse=True)
            best = table["p_value"].to_numpy()[first]
            number = np.empty(len(first), np.int64)
            number[np.lexsort((first, best))] = np.arange(1, len(first) + 1)
            order = np.argsort(number[entry], kind="stable")
            table = table.append_column("entry", pa.array(number[entry])).take(order).select(_LIST_COLUMNS).cast(schema)
        with atomic_path(self._folder / LIST) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def print(self, console: Console, *, drift_only: bool = False) -> None:
        """Print what is flagged, how long the review list is, and whether scores have drifted."""
        warning = None if self.drift is None else self.drift.warning
        texts = []
        if not drift_only:
            head = f"value >= {self._judge.threshold:.6f}"
            table = [
                (_CLASSES[name], f"{rows:,}", f"{flagged:,}", *prompts.cells)
                for name, (rows, flagged, prompts) in self.flagged.items()
            ]
            print_table(console, (head, "rows", "flagged", "of prompts", "95% interval"), table)
            listed = self.listed
            text = (
                f"{LIST}: review list of {listed.prompts:,} prompts ({listed.rows:,} rows), at most {FDR:.0%} "
                "expected false alarms"
            )
            if not listed.rows:
                text = f"{LIST} is empty: too few calibration prompts for a {FDR:.0%} false-discovery list"
            texts.append(text if warning is None else f"{text}; as the scores have drifted, that does not hold here")
        if warning is not None:
            texts.append(f"Warning: {warning}")
        elif self.drift is not None and not drift_only:
            texts.append(
                f"No drift is seen in {self.drift.n:,} prompts; it takes about {self.drift.notices_from:,} to notice "
                "that twice as many as promised are flagged"
            )
        if self.new_rows:
            texts.append(
                f"Warning: {self.new_rows:,} rows have system prompts that the threshold was not set under: its "
                "promise is not known to hold for them; calibrate on rows with these too"
            )
        if isinstance(self._judge, BareThreshold):
            texts = [f"Warning: {NO_PROMISE}"]
        for text in texts:
            console.print()
            for line in wrap(text, min(console.width, 100)):
                console.print(line, markup=False, highlight=False)


@dataclass(frozen=True, slots=True)
class ReviewList:
    """The prompts to look at, on average at most a fraction FDR of them false alarms (Benjamini-Hochberg).

    The list is of distinct prompts, not of rows: a popular one counts once, with all its rows beneath it. The prompts
    of a group share one weight (weighted FDR, Benjamini and Hochberg 1997), so that a large group counts no more than
    a small one.

    Attributes:
        prompts, rows: How many are on it.
        highest_p_value: The highest on the list; None if the list is empty.
    """

    prompts: int
    rows: int
    highest_p_value: float | None

    @classmethod
    def of_folder(cls, folder: Path, n_rows: int) -> ReviewList:
        """Make the list of the rows in a folder's parts."""
        n_passes = -(-n_rows // _ROWS_AT_ONCE)
        weight_of, total = defaultdict[float, float](float), 0.0
        prompts_of, rows_of = Counter[float](), Counter[float]()
        for number in range(n_passes):
            keys, groups, values = [], [], []
            for batch in read_batches(folder, ["p_value", *_KEYS]):
                own = hashes(batch, "group")
                chosen = own % n_passes == number
                keys.append(prompt_keys(batch)[chosen])
                groups.append(own[chosen])
                values.append(floats(batch, "p_value")[chosen])
            key, group, value = (np.concatenate(one) for one in (keys, groups, values))
            _, first, repeats = np.unique(key, return_index=True, return_counts=True)
            place = np.unique(group[first], return_inverse=True)[1]
            weight = 1 / np.bincount(place)[place]
            total += weight.sum()
            known = ~np.isnan(value[first])
            for p, one, n in zip(value[first][known].tolist(), weight[known].tolist(), repeats[known].tolist()):
                weight_of[p] += one
                prompts_of[p] += 1
                rows_of[p] += n
        highest = cutoff(np.array(list(weight_of)), np.array(list(weight_of.values())), total, FDR)
        listed = [] if highest is None else [p for p in weight_of if p <= highest]
        return cls(sum(prompts_of[p] for p in listed), sum(rows_of[p] for p in listed), highest)


@dataclass(frozen=True, slots=True)
class GatedClass:
    """What a gate did to a class of rows."""

    rows: int
    rows_blocked: int
    tokens: int  # decoded for answers
    blocked: Rate | None
    leaked: Rate | None  # answers with a fail term; None without fail terms
    leaked_ungated: Rate | None  # the same without the gate; None unless compared
    prevented: Rate | None  # blocked answers that would have had a fail term; None unless compared


def gated_classes(folder: Path, samples: Mapping[str, NDArray[np.int64]], *, compared: bool) -> dict[str, GatedClass]:
    """Count what a gate did to the rows in a folder's parts.

    `samples` are, by class, the numbers from 0 of the rows that stand for its distinct prompts; `compared` tells
    whether the parts have a column leaked_ungated.
    """
    sampled = np.sort(np.concatenate([*samples.values(), np.array([], np.int64)]))
    columns = ["label", "blocked", "leaked", "answer_tokens", "group", *(["leaked_ungated"] if compared else [])]
    rows, blocked, tokens = Counter[str](), Counter[str](), Counter[str]()
    prompts: dict[str, list[dict[str, Any]]] = {label: [] for label in samples}
    first = 0
    for batch in read_batches(folder, columns):
        labels = batch["label"].fill_null("unlabelled").to_pylist()
        for label, is_blocked, n in zip(labels, batch["blocked"].to_pylist(), batch["answer_tokens"].to_pylist()):
            rows[label] += 1
            blocked[label] += is_blocked
            tokens[label] += n
        start, stop = np.searchsorted(sampled, [first, first + len(batch)])
        for row in batch.take(pa.array(sampled[start:stop] - first)).to_pylist():
            prompts[row["label"] or "unlabelled"].append(row)
        first += len(batch)

    def rate(label: str, *names: str) -> Rate | None:
        """The rate of prompts for which all these columns are true; None if the parts do not have them."""
        of_class = prompts[label]
        if any(of_class[0].get(name) is None for name in names):
            return None
        groups = np.unique([row["group"] for row in of_class], return_inverse=True)[1]
        return Rate.from_hits([all(row[name] for name in names) for row in of_class], groups)

    return {
        label: GatedClass(
            rows=rows[label],
            rows_blocked=blocked[label],
            tokens=tokens[label],
            blocked=rate(label, "blocked"),
            leaked=rate(label, "leaked"),
            leaked_ungated=rate(label, "leaked_ungated"),
            prevented=rate(label, "blocked", "leaked_ungated"),
        )
        for label in samples
    }


def print_gated(console: Console, classes: Mapping[str, GatedClass]) -> None:
    blocked, leaks = [], []
    for name, gated in classes.items():
        counts = (f"{n:,}" for n in (gated.rows, gated.rows_blocked, gated.tokens))
        assert gated.blocked is not None
        blocked.append((name, *counts, *gated.blocked.cells))
        rates = (gated.leaked, gated.leaked_ungated, gated.prevented)
        for what, rate in zip(("with the gate", "without it", "prevented by it"), rates):
            if rate is not None:
                leaks.append((f"{name}, {what}", f"{rate.k:,} of {rate.n:,}", *rate.cells))
    print_table(console, ("", "rows", "blocked", "tokens made", "of prompts", "95% interval"), blocked)
    if leaks:
        print_table(console, ("answers with a fail term", "prompts", "", "95% interval"), leaks)
