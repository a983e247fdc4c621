"""What vLLM calls in a worker: which slot each request of a batch has, and the engine's calls of the recorder.

This is the only module that tells model runner V1 from V2. vLLM tells a logits processor which request is where, before
it builds the attention metadata. V1 gives batch rows that are added, removed and moved; V2 gives each request a
`req_idx` for its life.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1Processor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2Processor

from headrift.vllm_plugin.instruments import unlimited_config
from headrift.vllm_plugin.recorder import Recorder, probe_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.attention.backend import CommonAttentionMetadata


class WorkerExtension:
    """Methods that `collective_rpc` reaches on each worker. Arrays leave as bytes (vLLM drops arrays)."""

    vllm_config: VllmConfig

    def headrift_start(self) -> dict[str, Any]:
        """`Recorder.start`, once, when the model is loaded; then `Recorder.describe`."""
        recorder = Recorder.required(self.vllm_config)
        recorder.start(self.get_model())  # type: ignore[attr-defined]
        return recorder.describe()

    def headrift_call(self, method: str, *args: Any, instrument: str | None = None) -> Any:
        """Call a method of the recorder, or of an instrument by the name of its class."""
        recorder = Recorder.required(self.vllm_config)
        return getattr(recorder if instrument is None else recorder.instrument(instrument), method)(*args)


def batch_rows(metadata: CommonAttentionMetadata) -> np.ndarray:
    """The runner's own number of each request of the batch about to run, in batch order."""
    rows = metadata.req_idx
    return np.arange(metadata.num_reqs) if rows is None else rows[: metadata.num_reqs]


class _Rows:
    """What both runners' processors share."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any):
        self.recorder = Recorder.required(vllm_config)
        self.rows = self.recorder.runner_rows

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        # The engine's own limits are not known here; they are checked again when the request is admitted.
        probe_of(sampling_params, unlimited_config())

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        self.recorder.read_logits(logits)
        return logits


class RowsV1(_Rows, V1Processor):
    """Keeps the recorder's row table as the V1 runner moves requests between batch rows."""

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        self.recorder.begin_step()
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.rows[row] = -1
        for row, params, *_ in batch_update.added:
            self.rows[row] = self.recorder.admit(params)
        for a, b, how in batch_update.moved:
            if how == MoveDirectionality.SWAP:
                self.rows[[a, b]] = self.rows[[b, a]]
            else:
                self.rows[b], self.rows[a] = self.rows[a], -1

    def is_argmax_invariant(self) -> bool:
        # False makes the sampler call `apply` for greedy batches too; the logits are never changed.
        return not self.recorder.logit_readers


class RowsV2(_Rows, V2Processor):
    """Keeps the recorder's table by the V2 runner's `req_idx`."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        slot = self.rows[req_idx] = self.recorder.admit(sampling_params)
        return slot >= 0 and bool(self.recorder.logit_readers)

    def apply_staged_writes(self) -> None:
        self.recorder.begin_step()
