"""A measure is added by one class and one request field: a toy instrument's numbers arrive in the recording.

`PromptEcho` has every part an instrument may have. It is written here, not in the package, and nothing else names it.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from headrift.probed_engine import ProbedEngine
from headrift.requests import ProbeRequest
from headrift.vllm_plugin.instruments import (
    Attended,
    Instrument,
    Output,
    StepBatch,
    instrument_types,
    parse_config,
    parse_probe,
    recording_outputs,
)
from headrift.vllm_plugin.slots import Place, Probe, RecorderConfig, SlotTable

STEPS = 3


@dataclass(frozen=True, slots=True)
class EchoRequest(ProbeRequest):
    """A request with the one more field that the toy instrument obeys."""

    echo: float = 0.0


class PromptEcho(Instrument):
    """Largest logit of each step, size of each head's output at the last step, and a number that the request gives."""

    options: ClassVar = {"echo": False}
    fields: ClassVar = {"echo": 0.0}
    outputs = (
        Output("largest", per_head=False),
        Output("size", per_step=False),
        Output("number", per_step=False, per_head=False),
    )
    reads_logits = in_layers = True

    def __init__(self, table: SlotTable, place: Place):
        super().__init__(table, place)
        self.largest = self.per_slot(table.config.steps + 1)
        self.size = self.per_slot(len(place.layers), len(place.heads))
        self.number = self.per_slot()
        self._numbers = np.zeros(table.config.slots, np.float32)

    @classmethod
    def check(cls, probe: Probe, config: RecorderConfig) -> None:
        if probe.fields["echo"] < 0:
            raise ValueError("echo is 0 or more")

    def admit(self, slot: int, probe: Probe) -> None:
        self._numbers[slot] = probe.fields.get("echo", 0.0)

    def install(self, slots: np.ndarray, index: torch.Tensor) -> None:
        super().install(slots, index)
        self.number.index_copy_(0, index, self.table.on_device(self._numbers[slots]))

    def read_logits(self, logits: torch.Tensor) -> None:
        for row, slot in enumerate(self.table.slots.tolist()):
            step = int(self.table.row_step[row])
            if slot >= 0 and 0 <= step < self.table.step_limits[slot]:
                self.largest[slot, step] = logits[row].max()

    def plan(self, batch: StepBatch):
        rows = np.flatnonzero(batch.slots >= 0)
        return batch.slots[rows], batch.query_start[rows + 1] - 1

    def after_attention(self, plan, attended: Attended) -> None:
        slots, last_tokens = plan
        self.size[slots, attended.impl.layer_index] = attended.output[last_tokens].float().norm(dim=-1)


def test_it_is_found_by_itself():
    assert PromptEcho in instrument_types()
    assert {"largest", "size", "number", "share", "stats"} <= recording_outputs().keys()
    config = parse_config({"slots": 1, "steps": 1, "echo": True})
    assert (config.options["echo"], config.options["logit_stats"]) == (True, False)


def test_its_request_field_is_checked():
    probe = {"slot": 0, "request_id": 0, "prompt_len": 3, "regions": [], "steps": 1, "echo": 2.0}
    assert parse_probe(probe, parse_config({"slots": 1, "steps": 1, "echo": True})).fields == {"echo": 2.0}
    with pytest.raises(ValueError, match="echo is off in this engine: set echo=True"):
        parse_probe(probe, parse_config({"slots": 1, "steps": 1}))
    with pytest.raises(ValueError, match="echo is 0 or more"):
        parse_probe({**probe, "echo": -1.0}, parse_config({"slots": 1, "steps": 1, "echo": True}))
    with pytest.raises(ValueError, match="no setting 'ecco'"):
        parse_config({"slots": 1, "steps": 1, "ecco": True})


def test_its_numbers_arrive(tiny_model, oracle, settings_of_tests):
    settings = {**settings_of_tests, "skip_tokenizer_init": True, "max_num_seqs": 4, "max_model_len": 256}
    model = tiny_model("llama-3to1")
    rng = np.random.default_rng(0)
    with ProbedEngine(model, steps=STEPS, slots=6, engine_args=settings, echo=True, logit_stats=True) as engine:
        requests = []
        for i in range(9):
            ids = rng.integers(3, 200, 20 + 9 * i).tolist()
            fields = {"ignore_eos": True, "probed": i % 4 > 0, "echo": float(i) if i % 4 else 0.0}
            requests.append(EchoRequest(ids, {"system": (0, 9)}, i % (STEPS + 1), **fields))
        plain = ProbeRequest(requests[1].prompt_ids, {"system": (0, 9)}, STEPS, ignore_eos=True)
        with pytest.raises(ValueError, match=r"echo: .* probed"):
            engine.submit(EchoRequest([5, 6], {}, 0, probed=False, echo=1.0))
        results = {key: (done, recording) for key, done, recording in engine.run(enumerate([*requests, plain]))}
        assert engine.recorder_bytes > 0
    for i in range(9):
        done, recording = results[i]
        if not done.request.probed:
            assert recording is None
            continue
        ids, n = list(done.request.prompt_ids), done.n_steps
        logits = oracle("llama-3to1").run([*ids, *done.answer_ids[:n]], len(ids) - 1).logits
        assert recording.number == i
        assert recording.measures["size"].shape == (engine.layers, engine.heads)
        assert (recording.size > 0).all()
        np.testing.assert_allclose(recording.largest, logits.max(-1).values, rtol=0, atol=1e-4)
        assert np.isfinite(recording.stats).all()
    assert set(results[9][1].measures) == {"stats"}, "a request that does not ask has none of its numbers"
    with pytest.raises(AttributeError, match="no 'largest'"):
        results[9][1].largest
