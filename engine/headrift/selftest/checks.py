"""The checks of a self-test, functions of recorded numbers, and what they compare with: plain vLLM and transformers.

Run as a program this answers the prompts of one JSON file by vLLM without headrift, into another.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headrift import signal
from headrift.vllm_plugin.plugin import SWITCH

if TYPE_CHECKING:
    import torch

# The recorder sums in float32 whatever the model's type is: some thousand exponentials, each good to about 1e-6, give
# a sum that is good to a part of this. A key too many or too few among a few hundred moves a sum by more.
SUM_TOLERANCE = 1e-4
# Shares divide by the prompt's mass, and below this they magnify its rounding more than tenfold.
LEAST_PROMPT_MASS = 0.1
_HEADRIFT_MODULES = ("headrift_kernels", "headrift.vllm_plugin.recorder", "headrift.vllm_plugin.backends")
_MAX_MESSAGE = 400  # characters of a failed process's last words
# In units of the weights' size: with activations and the attention matrices of the longest prompt.
_HEADROOM = 1.25


@dataclass(frozen=True, slots=True)
class Check:
    """A line of the report."""

    name: str
    passed: bool | None  # None if it was not judged
    figure: str  # what was measured
    bar: str  # what it is held to and why, or why it was not judged
    numbers: dict[str, Any] = field(default_factory=dict)  # for machines to read


@dataclass(frozen=True, slots=True)
class Bars:
    """How far right numbers may be apart, and why."""

    tie: float  # gap of the two best logits below which either may win
    largest: float  # of any two masses
    per_head: float  # of a head's masses in the mean
    rounding: str
    seen: str


def bars_of(dtype: str, device: str) -> Bars:
    """The bars of a model computed in float32, bfloat16 or float16 on a device (`cpu`, `cuda`, ...).

    The bars of masses are some multiple of what the demonstration model shows, 30 layers deep: deeper models add up
    more rounding. What is wrong is further off: heads or steps mixed up, or a key range that is off by a few keys.
    """
    if dtype == "bfloat16":
        # Logits of 16 to 32 are 1/8 apart in bfloat16: four steps, for both of them are rounded, here and on the way.
        seen = "the demonstration model's are 0.05 and 0.004 from float32's"
        return Bars(0.5, 0.15, 0.015, "bfloat16 keeps 8 bits", seen)
    if dtype == "float16":
        return Bars(0.06, 0.03, 0.003, "float16 keeps 11 bits", "a little over an eighth of bfloat16's bars")
    if device != "cpu":
        return Bars(
            0.01, 0.01, 0.001, "of float32 tensor cores may keep 11 bits when they multiply", "as float16, less"
        )
    seen = "the demonstration model's are 8e-6 and 5e-7 apart"
    return Bars(1e-3, 5e-5, 5e-6, "float32 sums in another order differ in the last bits", seen)


def parting(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index where two answers differ; None where they are equal."""
    if list(a) == list(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def same_tokens(
    name: str,
    answers: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    gaps: Sequence[Sequence[float]],
    bars: Bars,
) -> Check:
    """Answers equal those expected; `gaps` are of the two best logits, along the expected answers.

    A row may part from the expected one only where the gap is below `bars.tie`; such rows are counted.
    """
    if not len(answers) == len(expected) == len(gaps) or not len(answers):
        raise ValueError(f"{len(answers)} answers, {len(expected)} expected ones and {len(gaps)} rows of gaps")
    ties: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    for row, (ours, theirs, gap) in enumerate(zip(answers, expected, gaps)):
        step = parting(ours, theirs)
        if step is None:
            continue
        apart = float(gap[step]) if step < len(gap) else np.inf
        (ties if apart < bars.tie else wrong).append({"row": row, "token": step, "gap": apart})
    equal = len(answers) - len(ties) - len(wrong)
    figure = f"{equal} of {len(answers)} rows equal, {len(ties)} parted at a near-tie, {len(wrong)} wrong"
    if wrong:
        first = wrong[0]
        figure += f" (row {first['row']} at token {first['token']}: logits {first['gap']:.3g} apart)"
    bar = f"a row may part only where the two best logits are less than {bars.tie:g} apart: {bars.rounding}"
    numbers = {"rows": len(answers), "equal": equal, "near_ties": ties, "wrong": wrong, "bar": bars.tie}
    return Check(name, not wrong, figure, bar, numbers)


def gaps_along(
    answers: Sequence[Sequence[int]], plain: Sequence[Sequence[int]], gaps: Sequence[Sequence[float]]
) -> list[list[float]]:
    """The gaps along answers that are plain's but for near-ties: 0 once a row has parted, where plain's say nothing."""
    known = []
    for answer, theirs, gap in zip(answers, plain, gaps, strict=True):
        step = parting(answer, theirs)
        known.append(list(gap) if step is None else [*gap[:step], *[0.0] * (len(gap) - step)])
    return known


def every_step(shares: Sequence[NDArray], n_steps: Sequence[int]) -> Check:
    """Each request has a number for each head at each of its steps. shares: [T, layers, heads] by request."""
    expected = sum(n + 1 for n in n_steps)
    recorded = sum(int((~np.isnan(share).any(axis=(1, 2))).sum()) for share in shares)
    numbers = {"there": recorded, "wanted": expected}
    figure = f"{recorded} of {expected} steps"
    return Check("every step recorded", recorded == expected, figure, "all of them", numbers)


def within_bounds(masses: Sequence[NDArray]) -> Check:
    """Masses [T, layers, heads, regions] are from 0 to 1, and none is missing."""
    low, high = float(np.min([m.min() for m in masses])), float(np.max([m.max() for m in masses]))
    return Check(
        "masses from 0 to 1",
        bool(low >= 0.0 and high <= 1.0 + SUM_TOLERANCE),
        f"{low:.6f} to {high:.6f}",
        f"at most {SUM_TOLERANCE:g} above 1: they are sums in float32",
        {"lowest": low, "highest": high, "bar": SUM_TOLERANCE},
    )


def sum_to_one(name: str, masses: Sequence[NDArray], why: str, *, sinks: bool) -> Check:
    """Masses that have to be 1 each, but in a model with attention sinks."""
    if sinks:
        return Check(name, None, "not judged", "this model's attention sinks take a part of each head's mass")
    away = float(np.max([np.abs(m - 1.0).max() for m in masses]))
    bar = f"{SUM_TOLERANCE:g}, {why}: sums in float32"
    return Check(name, away <= SUM_TOLERANCE, f"off by {away:.1e} at most", bar, {"off": away, "bar": SUM_TOLERANCE})


def same_masses(name: str, masses: Sequence[NDArray], expected: Sequence[NDArray], bars: Bars) -> Check:
    """Two sets of masses [T, layers, heads, regions] agree: each of them, and closer so each head in the mean."""
    apart = [np.abs(f.astype(np.float64) - e) for f, e in zip(masses, expected, strict=True)]
    largest = float(np.max([d.max() for d in apart]))
    steps = np.concatenate(apart)
    heads = steps.mean(axis=(0, 3))
    layer, head = np.unravel_index(np.argmax(heads), heads.shape)
    worst = float(heads[layer, head])
    return Check(
        name,
        largest <= bars.largest and worst <= bars.per_head,
        f"{largest:.1e} at most; {worst:.1e} in the mean of the worst head (layer {layer}, head {head}), "
        f"over {len(steps)} steps",
        f"{bars.largest:g} at most, {bars.per_head:g} in a head's mean: {bars.rounding}; {bars.seen}",
        {
            "largest": largest,
            "worst_head_mean": worst,
            "worst_head": [int(layer), int(head)],
            "mean": float(steps.mean()),
            "steps": len(steps),
            "bars": [bars.largest, bars.per_head],
        },
    )


def same_shares(
    name: str,
    shares: Sequence[NDArray],
    expected: Sequence[NDArray],
    bars: Bars,
    *,
    system: int,
    prompt: int,
) -> Check:
    """Shares [T, layers, heads] are those of the expected masses [T, layers, heads, regions].

    Only if the prompt's mass is above LEAST_PROMPT_MASS. A share has the masses' error divided by that mass, so it is
    weighed by it.
    """
    apart, cells = 0.0, 0
    for share, mass in zip(shares, expected, strict=True):
        whole = mass[..., prompt]
        clear = whole > LEAST_PROMPT_MASS
        gap = np.abs(share - signal.share(mass[..., system], whole)) * np.where(clear, whole, 0.0)
        apart, cells = float(np.max([apart, gap.max()])), cells + int(clear.sum())
    return Check(
        name,
        bool(cells) and apart <= 2 * bars.largest,
        f"{apart:.1e} at most, of {cells} shares, weighed by the prompt's mass",
        f"{2 * bars.largest:g}: the errors of the two masses that are divided; {bars.rounding}",
        {"largest": apart, "cells": cells, "bar": 2 * bars.largest},
    )


def throughput(pairs: Sequence[tuple[float, float]], requests: int) -> Check:
    """What probing costs: pairs of seconds, plain and probed, for the same requests in turns. Not judged."""
    ratios = [probed / plain for plain, probed in pairs]
    rate = requests / statistics.median(plain for plain, _ in pairs)
    return Check(
        "throughput, plain / probed",
        None,
        f"{statistics.median(ratios):.3f} (median of {len(pairs)} rounds, {min(ratios):.3f} to {max(ratios):.3f}); "
        f"{rate:.1f} plain requests/s",
        "reported, not judged: 1 is a probe that costs nothing, 1.05 one that takes 5% of the speed",
        {
            "median": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "rounds": [{"plain_s": plain, "probed_s": probed} for plain, probed in pairs],
        },
    )


@dataclass(frozen=True, slots=True)
class PlainAnswers:
    """By prompt: the answer's token ids, and at each of them the gap between the two best logits."""

    token_ids: list[list[int]]
    gaps: list[list[float]]


def plain_answers(
    settings: Mapping[str, Any], prompts: Sequence[Sequence[int]], tokens: int, *, verbose: bool = False
) -> PlainAnswers:
    """Answer prompts greedily by vLLM without headrift, in a process of its own, `tokens` tokens past any end of text.

    RuntimeError, with the process's last words, if it does not end well.
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

    It is on the GPU if it fits there, else in main memory. CannotCompareError if neither, or if it cannot be loaded.
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
