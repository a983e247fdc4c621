"""What a self-test compares with: plain vLLM, and transformers with eager attention.

Run as a program this answers the prompts of one JSON file by vLLM without headrift, into another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headrift.vllm_plugin.plugin import SWITCH

if TYPE_CHECKING:
    import torch

_HEADRIFT_MODULES = ("headrift_kernels", "headrift.vllm_plugin.recorder", "headrift.vllm_plugin.backends")
_MAX_MESSAGE = 400  # characters of a failed process's last words
# In units of the weights' size: with activations and the attention matrices of the longest prompt.
_HEADROOM = 1.25


@dataclass(frozen=True, slots=True)
class PlainAnswers:
    """By prompt: the answer's token ids, and at each of them the gap between the two best logits."""

    token_ids: list[list[int]]
    gaps: list[list[float]]


def plain_answers(
    settings: Mapping[str, Any], prompts: Sequence[Sequence[int]], tokens: int, *, verbose: bool = False
) -> PlainAnswers:
    """Answer prompts greedily by vLLM without headrift, in a process of its own, `tokens` tokens past any end of text.

    Raises:
        RuntimeError: With the process's last words, if it does not end well.
    """
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    with tempfile.TemporaryDirectory(prefix="headrift-selftest-") as folder:
        request, response = Path(folder) / "request.json", Path(folder) / "response.json"
        request.write_text(json.dumps({"settings": dict(settings), "prompts": list(prompts), "tokens": tokens}))
        command = [sys.executable, "-P", "-m", __name__, str(request), str(response)]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=None if verbose else subprocess.PIPE, text=True
        )
        if done.returncode:
            message = (done.stderr or "").strip()[-_MAX_MESSAGE:]
            raise RuntimeError(f"vLLM without headrift ended with status {done.returncode}: {message}")
        return PlainAnswers(**json.loads(response.read_text()))


def _answer(settings: Mapping[str, Any], prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**settings))
    # A log-probability is the logit less what all logits have in common: the gaps are the logits' own.
    params = SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=2,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), TokensPrompt(prompt_token_ids=list(prompt)), params)
    outputs: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
    answers = [outputs[str(i)] for i in range(len(prompts))]
    engine.engine_core.shutdown()
    return {
        "token_ids": [list(answer.token_ids) for answer in answers],
        "gaps": [[_gap([p.logprob for p in best.values()]) for best in answer.logprobs] for answer in answers],
    }


def _gap(logprobs: list[float]) -> float:
    first, second = sorted(logprobs, reverse=True)[:2]
    return first - second


class CannotCompareError(RuntimeError):
    """transformers cannot run this model here; the message says why."""


class EagerModel:
    """The model in float32 with transformers' eager attention: slow, and the definition in other people's code.

    It is on the GPU if it fits there, else in main memory.

    Raises:
        CannotCompareError: If it fits neither, or transformers cannot load it.
    """

    def __init__(self, model: str, *, trust_remote_code: bool = False) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                shape = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            self.device = _device_with_room(4 * sum(parameter.numel() for parameter in shape.parameters()))
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
            )
            self._model = loaded.to(self.device).eval()
        except CannotCompareError:
            raise
        except Exception as error:  # a model's files and code can fail in any way
            line = str(error).strip().partition("\n")[0]
            raise CannotCompareError(f"transformers cannot load the model: {type(error).__name__}: {line}") from error

    def masses(self, token_ids: Sequence[int], first: int, spans: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
        """Masses [queries, layers, heads, spans] on key ranges, of the queries from position `first` on."""
        import torch

        with torch.inference_mode():
            tokens = torch.tensor([list(token_ids)], device=self.device)
            layers = self._model(tokens, use_cache=False, output_attentions=True).attentions
            rows = torch.stack([layer[0, :, first:].float() for layer in layers]).permute(2, 0, 1, 3)
            return torch.stack([rows[..., start:end].sum(-1) for start, end in spans], -1).cpu().numpy()


def _device_with_room(n_bytes: int) -> torch.device:
    """Where a model with weights of this size fits."""
    import psutil
    import torch

    need = int(n_bytes * _HEADROOM)
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > need:
        return torch.device("cuda")
    free = psutil.virtual_memory().available
    if free > need:
        return torch.device("cpu")
    sizes = f"transformers would take {need / 1e9:.0f} GB for it in float32, and {free / 1e9:.0f} GB are free"
    raise CannotCompareError(f"the model is too large to compare with: {sizes}")


def main() -> None:
    request, response = map(Path, sys.argv[1:])
    answers = _answer(**json.loads(request.read_text()))
    loaded = [name for name in sys.modules if name.startswith(_HEADRIFT_MODULES)]
    if loaded:
        raise SystemExit(f"this was to be vLLM without headrift, and {loaded[0]} is loaded")
    response.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
