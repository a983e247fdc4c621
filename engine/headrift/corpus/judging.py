"""A calibration in a run: whether it is for the run's model, and what it says of all rows at the end.

Each row's `flagged` and `p_value` are in the parts. The review list of rows of which few are benign is made from them
in two passes over the parts: memory is flat in the number of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from headrift.calibration.artifact import Drift, cutoff, drift
from headrift.calibration.thresholds import CalibrationError
from headrift.runs.folder import atomic_path
from headrift.runs.parts import column_types
from headrift.runs.reading import read_batches
from headrift.stats import exact_interval
from headrift.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from headrift.calibration.artifact import Calibration

LIST = "flagged-fdr.parquet"
FDR = 0.1  # fraction of the rows on the review list that may be benign, on average
_LIST_COLUMNS = ["id", "source", "row", "score", "p_value"]
_CLASSES = {"attack": "attack (found: TPR)", "benign": "benign (flagged: FPR)", "unlabelled": "unlabelled"}
_SCORES_OF = {
    "benign": "benign scores",
    "unlabelled": "the scores of rows without a label, whatever attacks are among them,",
}


def differences(calibration: Calibration, identity: Mapping[str, Any]) -> list[str]:
    """Name, in words, what differs between the calibration's model and the one in a run's identity.

    Before the engine has started, only what is known of it is compared.
    """
    known = {"fingerprint": identity["model"]["fingerprint"], **(identity["engine"] or {})}
    same = {name: value for name, value in known.items() if name in type(calibration.model).model_fields}
    return calibration.model.differences(calibration.model.model_copy(update=same))


def check(calibration: Calibration, identity: Mapping[str, Any], *, anyway: bool) -> list[str]:
    """Return the differences. CalibrationError if there are any, unless the calibration is to be used anyway."""
    differs = differences(calibration, identity)
    if differs and not anyway:
        verb = "differs" if len(differs) == 1 else "differ"
        raise CalibrationError(
            f"--calibration is for something else than this run: {' and '.join(differs)} {verb}. Calibrate on runs of "
            "this model and template; or give --calibration-anyway, and its promise does not hold"
        )
    return differs


def particulars(calibration: Calibration, differs: list[str]) -> dict[str, Any]:
    """Return what run.json says of the calibration itself; `differs` is what `check` returned."""
    setting = calibration.setting
    return {
        "sha256": calibration.sha256,
        "threshold": calibration.threshold,
        "target_fpr": setting.target_fpr,
        "promise": setting.promise,
        "differs": differs,
    }


@dataclass(frozen=True, slots=True)
class Flagged:
    """How many rows, and how many distinct prompts, of a class are flagged."""

    rows: int
    flagged: int
    prompts: int  # distinct ones, at most 20,000, sampled
    prompts_flagged: int
    interval: tuple[float, float]  # exact, 95%, of the prompts' rate

    @property
    def rate(self) -> float:
        """Fraction of the distinct prompts that are flagged."""
        return self.prompts_flagged / self.prompts


class Judged:
    """What a calibration says of the rows in a folder's parts, which have its columns.

    Attributes:
        flagged: Counts by class.
        cutoff: The highest p-value on the review list; None if the list is empty.
        listed: How many rows are on it.
        drift: Of the scores of the class `drift_of`; None without benign and unlabelled rows.
    """

    def __init__(
        self, folder: Path, calibration: Calibration, prompt_scores: Mapping[str, NDArray[np.float64]]
    ) -> None:
        self._folder, self._calibration = folder, calibration
        rows, flagged, p_values = Counter[str](), Counter[str](), Counter[float]()
        for batch in read_batches(folder, ["label", "flagged", "p_value"]):
            labels = batch["label"].fill_null("unlabelled")
            rows.update(labels.to_pylist())
            flagged.update(labels.filter(batch["flagged"]).to_pylist())
            values, counts = np.unique(batch["p_value"].drop_null().to_numpy(), return_counts=True)
            p_values.update(dict(zip(values.tolist(), counts.tolist())))
        self._n = rows.total()
        self.flagged = {}
        for name, scores in prompt_scores.items():
            n = int(calibration.apply(scores).flagged.sum())
            interval = exact_interval(n, len(scores))
            self.flagged[name] = Flagged(rows[name], flagged[name], len(scores), n, interval)
        values, counts = np.array(list(p_values)), np.array(list(p_values.values()), np.int64)
        self.cutoff = cutoff(values, counts, self._n, FDR)
        self.listed = 0 if self.cutoff is None else int(counts[values <= self.cutoff].sum())
        self.drift_of = "benign" if "benign" in prompt_scores else "unlabelled"
        self.drift: Drift | None = None
        if self.drift_of in prompt_scores:
            self.drift = drift(prompt_scores[self.drift_of], calibration, _SCORES_OF[self.drift_of])

    def numbers(self) -> dict[str, Any]:
        """Return what run.json keeps."""
        by_class = {name: {**asdict(counts), "rate": counts.rate} for name, counts in self.flagged.items()}
        listed = {"rate": FDR, "rows": self.listed, "highest_p_value": self.cutoff, "file": LIST}
        moved = None if self.drift is None else {"of": self.drift_of, **asdict(self.drift)}
        return {"flagged": by_class, "fdr_list": listed, "drift": moved}

    def write_list(self) -> None:
        """Write the rows of the review list, in their order, to flagged-fdr.parquet. OSError if that fails."""
        types = {**column_types(), "p_value": pa.float64()}
        schema = pa.schema({name: types[name] for name in _LIST_COLUMNS})
        with (
            atomic_path(self._folder / LIST) as temporary,
            pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
        ):
            for batch in read_batches(self._folder, _LIST_COLUMNS) if self.cutoff is not None else ():
                on_list = batch.filter(pc.less_equal(batch["p_value"], self.cutoff))
                if len(on_list):
                    writer.write_batch(on_list)

    def print(self, console: Console) -> None:
        """Print what is flagged, how long the review list is, and whether scores have drifted."""
        rows = [
            (
                _CLASSES[name],
                f"{counts.rows:,}",
                f"{counts.flagged:,}",
                f"{counts.rate:.1%}",
                f"{counts.interval[0]:.1%}-{counts.interval[1]:.1%}",
            )
            for name, counts in self.flagged.items()
        ]
        head = f"score >= {self._calibration.threshold:.6f}"
        print_table(console, (head, "rows", "flagged", "of prompts", "95% interval"), rows)
        text = f"{LIST}: review list of {self.listed:,} rows, at most {FDR:.0%} expected false alarms"
        if not self.listed:
            text = f"{LIST} is empty: too few calibration prompts for a {FDR:.0%} false-discovery list"
        if self.drift is not None and self.drift.warning is not None:
            text += "; as the scores have drifted, that does not hold here"
        _print(console, text)
        self.print_warnings(console)

    def print_warnings(self, console: Console) -> None:
        """Warn if scores have drifted."""
        if self.drift is not None and self.drift.warning is not None:
            _print(console, f"Warning: {self.drift.warning}")


def _print(console: Console, text: str) -> None:
    console.print()
    for line in wrap(text, min(console.width, 100)):
        console.print(line, markup=False, highlight=False)
