"""The residual stream at the last prompt token, as an instrument of a probed engine: what probes of other work read.

PIShield's probe is a logistic regression on one layer's residual stream at that token. The states are taken by hooks on
the model's layers, which takes an engine in this process without a compiled model, as headrift's on a CPU is.
"""

import hashlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from headrift.probed_engine import ProbedEngine
from headrift.vllm_plugin.instruments import Instrument, Output
from headrift.vllm_plugin.recorder import Recorder

EVERY = 2  # layers of which one is kept
KEPT_AT_ONCE = 20  # prompts of a file


class Residuals(Instrument):
    """Keeps the residual stream behind every other layer at the last prompt token."""

    options: ClassVar = {"residuals": 0}
    outputs = (Output("residual", per_step=False, per_head=False),)
    in_layers = True

    def __init__(self, table, place):
        super().__init__(table, place)
        self.layers = list(place.layers)[EVERY - 1 :: EVERY]
        self.residual = self.per_slot(len(self.layers), place.width)
        self.rows = self.slots = None

    def plan(self, batch):
        """Note which tokens of the running step are the last of their prompts; nothing is done around attention."""
        lengths = np.where(batch.slots >= 0, self.table.prompt_lens[batch.slots], -1)
        last = np.flatnonzero(batch.seq_lens == lengths)
        self.rows = torch.from_numpy(batch.query_start[last + 1].astype(np.int64) - 1)
        self.slots = torch.from_numpy(batch.slots[last].astype(np.int64))

    def watch(self, model):
        """Have the model's layers hand over what they return."""
        for place, layer in enumerate(self.layers):

            def see(_module, _inputs, returned, place=place):
                if self.rows is not None:
                    hidden, residual = returned
                    self.residual[self.slots, place] = (hidden[self.rows] + residual[self.rows]).float()
                    if place == len(self.layers) - 1:
                        self.rows = None  # a step without probed requests plans nothing

            model.model.layers[layer].register_forward_hook(see)


class ResidualEngine(ProbedEngine):
    """An engine that writes the residuals of its prompts to `folder`, by `key` of their token ids."""

    def __init__(self, *args, folder, **options):
        super().__init__(*args, residuals=1, **options)

        def watch(worker):
            Recorder.required(worker.vllm_config).instrument("Residuals").watch(worker.model_runner.model)

        self.llm_engine.collective_rpc(watch)
        self._folder, self._kept = Path(folder), {}
        self._folder.mkdir(parents=True, exist_ok=True)

    def _read_recording(self, finished, arrays, i):
        recording = super()._read_recording(finished, arrays, i)
        largest = np.finfo(np.float16).max
        states = np.clip(recording.measures["residual"], -largest, largest).astype(np.float16)
        self._kept[key(finished.request.prompt_ids)] = states
        if len(self._kept) >= KEPT_AT_ONCE:
            self._write()
        return recording

    def _write(self):
        if self._kept:
            number = len(list(self._folder.glob("*.npz")))
            states = np.stack(list(self._kept.values()))
            np.savez(self._folder / f"{number:05d}.npz", key=np.array(list(self._kept)), states=states)
            self._kept = {}

    def close(self):
        self._write()
        super().close()


def key(token_ids) -> str:
    """Name a prompt by its token ids."""
    return hashlib.sha256(np.asarray(token_ids, np.int64).tobytes()).hexdigest()[:16]


def read(folder: Path) -> dict[str, np.ndarray]:
    """Read what engines have written: float16 [layers, width] by key."""
    files = [np.load(path) for path in sorted(folder.glob("*.npz"))]
    return {name: states for file in files for name, states in zip(file["key"].tolist(), file["states"])}
