"""What a calibration says of a run's rows at the end, and what a gate did with them.

Each row's `flagged`, `p_value` and `blocked` are in the parts, which are read again: memory is flat in the number of
rows. Rates are of distinct prompts (at most 20,000 of a class, sampled).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headrift.calibration.artifact import Drift, cutoff, drift
from headrift.calibration.bare import NO_PROMISE, BareThreshold
from headrift.calibration.thresholds import CalibrationError
from headrift.runs.folder import atomic_path
from headrift.runs.parts import column_types
from headrift.runs.reading import read_batches
from headrift.stats import exact_interval
from headrift.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from headrift.calibration.artifact import Calibration
    from headrift.calibration.bare import Judge

LIST = "flagged-fdr.parquet"
FDR = 0.1  # fraction of the rows on the review list that may be benign, on average
_MOST_TOLD = 20  # hashes of new system prompts in run.json
_LIST_COLUMNS = ["id", "source", "row", "score", "detector", "p_value"]
_CLASSES = {"attack": "attack (found: TPR)", "benign": "benign (flagged: FPR)", "unlabelled": "unlabelled"}


def check(calibration: Calibration, identity: Mapping[str, Any], *, anyway: bool) -> list[str]:
    """Name, in words, what differs between the calibration's model and the one in a run's identity.

    Before the engine has started, only what is known of it is compared. CalibrationError if anything differs, unless
    the calibration is to be used anyway.
    """
    known = {"fingerprint": identity["model"]["fingerprint"], **(identity["engine"] or {})}
    same = {name: value for name, value in known.items() if name in type(calibration.model).model_fields}
    differs = calibration.model.differences(calibration.model.model_copy(update=same))
    if differs and not anyway:
        verb = "differs" if len(differs) == 1 else "differ"
        raise CalibrationError(
            f"--calibration is for something else than this run: {' and '.join(differs)} {verb}. Calibrate on runs of "
            "this model and template; or give --calibration-anyway, and its promise does not hold"
        )
    return differs


@dataclass(frozen=True, slots=True)
class Rate:
    """k of n distinct prompts, with the exact 95% interval of the rate (Clopper-Pearson)."""

    k: int
    n: int
    rate: float
    interval: tuple[float, float]

    @classmethod
    def from_counts(cls, k: int, n: int) -> Rate:
        return cls(k, n, k / n, exact_interval(k, n))

    @property
    def cells(self) -> tuple[str, str]:
        return f"{self.rate:.1%}", f"{self.interval[0]:.1%}-{self.interval[1]:.1%}"


class Judged:
    """What a calibration, or a bare threshold, says of the rows in a folder's parts, which have its columns.

    Attributes:
        flagged: By class: rows, flagged rows, and the rate of flagged prompts.
        cutoff: The highest p-value on the review list; None if the list is empty.
        listed: How many rows are on it.
        drift: Of the scores of the class `drift_of`; None without benign and unlabelled rows, or a calibration.
        new_rows, new_system_prompts: Rows with system prompts that the calibration does not know, and the hashes of the
            first of these, 20 at most.
    """

    def __init__(self, folder: Path, judge: Judge, prompt_scores: Mapping[str, NDArray[np.float64]]) -> None:
        self._folder, self._judge = folder, judge
        rows, flagged, p_values = Counter[str](), Counter[str](), Counter[float]()
        known = None if isinstance(judge, BareThreshold) else judge.data.system_prompts
        self.new_rows, new = 0, dict[str, None]()
        for batch in read_batches(folder, ["label", "flagged", "p_value", "system_hash"]):
            if known is not None:
                hashes = batch["system_hash"].drop_null()
                hashes = hashes.filter(pc.invert(pc.is_in(hashes, value_set=pa.array(known, pa.string()))))
                self.new_rows += len(hashes)
                if len(new) < _MOST_TOLD:
                    new |= dict.fromkeys(hashes.unique().to_pylist())
            labels = batch["label"].fill_null("unlabelled")
            rows.update(labels.to_pylist())
            flagged.update(labels.filter(batch["flagged"]).to_pylist())
            values, counts = np.unique(batch["p_value"].drop_null().to_numpy(), return_counts=True)
            p_values.update(dict(zip(values.tolist(), counts.tolist())))
        self.flagged = {}
        for name, scores in prompt_scores.items():
            rate = Rate.from_counts(int(judge.apply(scores).flagged.sum()), len(scores))
            self.flagged[name] = rows[name], flagged[name], rate
        values, counts = np.array(list(p_values)), np.array(list(p_values.values()), np.int64)
        self.cutoff = cutoff(values, counts, rows.total(), FDR)
        self.listed = 0 if self.cutoff is None else int(counts[values <= self.cutoff].sum())
        self.drift_of: Literal["benign", "unlabelled"] = "benign" if "benign" in prompt_scores else "unlabelled"
        self.drift: Drift | None = None
        if self.drift_of in prompt_scores and not isinstance(judge, BareThreshold):
            self.drift = drift(prompt_scores[self.drift_of], judge, self.drift_of)
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
        listed = {"rate": FDR, "rows": self.listed, "highest_p_value": self.cutoff, "file": LIST}
        moved = None if self.drift is None else {"of": self.drift_of, **asdict(self.drift)}
        new = {"new_system_prompts": {"rows": self.new_rows, "hashes": self.new_system_prompts}}
        return {"flagged": by_class, "fdr_list": listed, "drift": moved, **new}

    def write_list(self) -> None:
        """Write the rows of the review list, in their order, to flagged-fdr.parquet. OSError if that fails."""
        types = {**column_types(), "detector": pa.float64(), "p_value": pa.float64()}
        schema = pa.schema({name: types[name] for name in _LIST_COLUMNS})
        with (
            atomic_path(self._folder / LIST) as temporary,
            pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
        ):
            for batch in read_batches(self._folder, _LIST_COLUMNS) if self.cutoff is not None else ():
                on_list = batch.filter(pc.less_equal(batch["p_value"], self.cutoff))
                if len(on_list):
                    if "detector" not in on_list.schema.names:  # parts that an earlier version wrote
                        on_list = on_list.append_column("detector", on_list["score"])
                    writer.write_batch(on_list.select(_LIST_COLUMNS))

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
            text = f"{LIST}: review list of {self.listed:,} rows, at most {FDR:.0%} expected false alarms"
            if not self.listed:
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
    columns = ["label", "blocked", "leaked", "answer_tokens", *(["leaked_ungated"] if compared else [])]
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
        return Rate.from_counts(sum(all(row[name] for name in names) for row in of_class), len(of_class))

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
