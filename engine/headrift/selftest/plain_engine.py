"""vLLM without headrift, in a process of its own: the answers that probing must not change.

Run as a program it reads what is asked of it from one JSON file and writes the answers to another.
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
from typing import Any

from headrift.vllm_plugin.plugin import SWITCH

_OURS = ("headrift_kernels", "headrift.vllm_plugin.recorder", "headrift.vllm_plugin.backends")
_SAID = 400  # characters of a failed process's last words


@dataclass(frozen=True, slots=True)
class PlainAnswers:
    """By prompt: the answer's token ids, and at each of them the gap between the two best logits."""

    token_ids: list[list[int]]
    gaps: list[list[float]]


def plain_answers(
    settings: Mapping[str, Any], prompts: Sequence[Sequence[int]], tokens: int, *, verbose: bool = False
) -> PlainAnswers:
    """Greedy answers of `tokens` tokens, past the end of text, of an engine with these engine arguments.

    RuntimeError with the process's last words where it does not end well.
    """
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    with tempfile.TemporaryDirectory(prefix="headrift-selftest-") as folder:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
        asked.write_text(json.dumps({"settings": dict(settings), "prompts": list(prompts), "tokens": tokens}))
        command = [sys.executable, "-P", "-m", __name__, str(asked), str(answered)]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=None if verbose else subprocess.PIPE, text=True
        )
        if done.returncode:
            said = (done.stderr or "").strip()[-_SAID:]
            raise RuntimeError(f"vLLM without headrift ended with status {done.returncode}: {said}")
        return PlainAnswers(**json.loads(answered.read_text()))


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
    answers: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        answers |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
    found = [answers[str(i)] for i in range(len(prompts))]
    engine.engine_core.shutdown()
    return {
        "token_ids": [list(answer.token_ids) for answer in found],
        "gaps": [[_gap([p.logprob for p in best.values()]) for best in answer.logprobs] for answer in found],
    }


def _gap(logprobs: list[float]) -> float:
    first, second = sorted(logprobs, reverse=True)[:2]
    return first - second


def main() -> None:
    asked, answered = map(Path, sys.argv[1:])
    answers = _answer(**json.loads(asked.read_text()))
    loaded = [name for name in sys.modules if name.startswith(_OURS)]
    if loaded:
        raise SystemExit(f"this was to be vLLM without headrift, and {loaded[0]} is loaded")
    answered.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
