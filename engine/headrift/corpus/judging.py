"""A calibration at work in a run: whether it is for the run's model, and what it says of the rows in the end.

What it says of each row, `flagged` and `p_value`, is in the parts (see scoring.Scoring). From these comes the list of
rows of which few are benign, in two passes over the parts: memory is flat in their number.
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

from headrift.calibration.settings import CalibrationError
from headrift.calibration.verdicts import Drift, cutoff, drift
from headrift.runs.folder import atomic_path
from headrift.runs.reading import read_batches
from headrift.stats import exact_interval
from headrift.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from headrift.calibration.record import Calibration

LIST = "flagged-fdr.parquet"
FDR = 0.1  # the fraction of rows on the list that may be benign, on average
_ON_LIST = ["id", "source", "row", "score", "p_value"]
_CLASSES = {"attack": "attack (found: TPR)", "benign": "benign (flagged: FPR)", "unlabelled": "unlabelled"}
_SCORES_OF = {
    "benign": "benign scores",
    "unlabelled": "the scores of rows without a label, whatever attacks are among them,",
}


def differences(calibration: Calibration, identity: Mapping[str, Any]) -> list[str]:
    """What of the model in a run's identity (see ScoreJob) is not as in the runs that were calibrated on, in words;
    before the engine has said what it is, as far as that is known."""
    known = {"fingerprint": identity["model"]["fingerprint"], **(identity["engine"] or {})}
    same = {name: value for name, value in known.items() if name in type(calibration.model).model_fields}
    return calibration.model.differences(calibration.model.model_copy(update=same))


def check(calibration: Calibration, identity: Mapping[str, Any], *, anyway: bool) -> list[str]:
    """The differences; CalibrationError where there are any, unless it is to be used anyway."""
    found = differences(calibration, identity)
    if found and not anyway:
        verb = "differs" if len(found) == 1 else "differ"
        raise CalibrationError(
            f"--calibration is for something else than this run: {' and '.join(found)} {verb}. Calibrate on runs of "
            "this model and template; or give --calibration-anyway, and its promise does not hold"
        )
    return found


def particulars(calibration: Calibration, differs: list[str]) -> dict[str, Any]:
    """What run.json says of the calibration itself. differs: see check."""
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
    """Of a class: rows and how many of them are flagged; distinct prompts (at most 20,000, drawn) and how many of them
    are, with the 95% interval of that rate (exact, Clopper-Pearson)."""

    rows: int
    flagged: int
    prompts: int
    prompts_flagged: int
    interval: tuple[float, float]

    @property
    def rate(self) -> float:
        """The fraction of distinct prompts that are flagged."""
        return self.prompts_flagged / self.prompts


class Judged:
    """What a calibration says of the rows in a folder's parts, which have its columns.

    prompt_scores: of each class (attack, benign, unlabelled) that has rows, the scores of its distinct prompts, NaN for
    none. flagged: by class. cutoff: the highest p-value on the list, None where nothing is on it; listed: how many rows
    are. drift: of the class `drift_of`, None without benign and unlabelled rows.
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
        """The figures for run.json."""
        by_class = {name: {**asdict(of), "rate": of.rate} for name, of in self.flagged.items()}
        listed = {"rate": FDR, "rows": self.listed, "highest_p_value": self.cutoff, "file": LIST}
        moved = None if self.drift is None else {"of": self.drift_of, **asdict(self.drift)}
        return {"flagged": by_class, "fdr_list": listed, "drift": moved}

    def write_list(self) -> None:
        """Write the rows on the list, in their order, to flagged-fdr.parquet. OSError where that fails."""
        fields = pa.schema(
            {
                "id": pa.string(),
                "source": pa.string(),
                "row": pa.int64(),
                "score": pa.float64(),
                "p_value": pa.float64(),
            }
        )
        with (
            atomic_path(self._folder / LIST) as temporary,
            pq.ParquetWriter(temporary, fields, compression="zstd") as writer,
        ):
            for batch in read_batches(self._folder, _ON_LIST) if self.cutoff is not None else ():
                on_list = batch.filter(pc.less_equal(batch["p_value"], self.cutoff))
                if len(on_list):
                    writer.write_batch(on_list)

    def print(self, console: Console) -> None:
        """Print what is flagged, how long the list is, and whether scores have drifted."""
        rows = [
            (
                _CLASSES[name],
                f"{of.rows:,}",
                f"{of.flagged:,}",
                f"{of.rate:.1%}",
                f"{of.interval[0]:.1%}-{of.interval[1]:.1%}",
            )
            for name, of in self.flagged.items()
        ]
        head = f"score >= {self._calibration.threshold:.6f}"
        print_table(console, (head, "rows", "flagged", "of prompts", "95% interval"), rows)
        said = f"{LIST} has {self.listed:,} rows, of which on average at most {FDR:.0%} are benign"
        if not self.listed:
            said += f": p-values begin at 1/{self._calibration.scores.n + 1:,} here, and too few rows have so low a one"
        if self.drift is not None and self.drift.warning is not None:
            said += "; as the scores have drifted, that does not hold here"
        _print(console, said)
        self.print_warnings(console)

    def print_warnings(self, console: Console) -> None:
        """Say whether scores have drifted."""
        if self.drift is not None and self.drift.warning is not None:
            _print(console, f"Warning: {self.drift.warning}")


def _print(console: Console, text: str) -> None:
    console.print()
    for line in wrap(text, min(console.width, 100)):
        console.print(line, markup=False, highlight=False)
