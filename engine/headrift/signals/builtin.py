"""The signals that headrift measures. Columns of scored parts are in this order.

An entry more is all that a new signal takes.
"""

from __future__ import annotations

import numpy as np

from headrift import signal
from headrift.signals.detectors import learn_heads, learn_novelty, learn_readout
from headrift.signals.registry import Array, PromptData, Signal, register

_STD = "std over heads, 0 to 0.5"
_NO_MASS = "the runs saved no mass, so focus is known at step 0 only: score with --save mass"


def _share_by_layer(data: PromptData) -> Array | None:
    return None if data.share is None else data.share.mean(axis=2)


def _focus(data: PromptData) -> float | None:
    return None if data.focus_heads is None else signal.focus(data.focus_heads)


def _focus_by_step(data: PromptData) -> Array | None:
    return None if data.focus_by_step is None else data.focus_by_step.mean(axis=(1, 2))


def _focus_important(data: PromptData) -> float | None:
    if data.focus_heads is None or data.important_heads is None:
        return None
    return signal.focus(data.focus_heads, np.argwhere(data.important_heads).tolist())


def _focus_important_by_step(data: PromptData) -> Array | None:
    if data.focus_by_step is None or data.important_heads is None:
        return None
    return data.focus_by_step[:, data.important_heads].mean(axis=1)


def _entropy_by_step(data: PromptData) -> Array | None:
    entropy = data.logit_stats.get("entropy")
    return None if entropy is None else entropy.astype(np.float64)


for _entry in (
    Signal(
        name="instability",
        label="instability",
        unit=_STD,
        how="the score: std of the heads' share, mean over steps and layers",
        value=lambda data: data.score(data.instability),
        steps=lambda data: data.layer_mean(data.instability),
        direction=1,
    ),
    Signal(
        name="instability_without_bos",
        label="instability, BOS left out",
        unit=_STD,
        how="the same with BOS a region of its own, share = system / (prompt - BOS)",
        value=lambda data: data.score(data.instability_without_bos),
        steps=lambda data: data.layer_mean(data.instability_without_bos),
        saves=("mass",),
        direction=1,
    ),
    Signal(
        name="system_share",
        label="system share",
        unit="fraction of the attention on the prompt",
        how="mean over steps, layers and heads",
        value=lambda data: data.over_cells(signal.mean_share, data.share),
        steps=lambda data: data.layer_mean(_share_by_layer(data)),
        column=True,
        saves=("shares",),
        direction=-1,
    ),
    Signal(
        name="system_share_without_bos",
        label="system share, BOS left out",
        unit="fraction of the attention on the prompt but BOS",
        how="system / (prompt - BOS), mean over steps, layers and heads",
        value=lambda data: data.over_cells(signal.mean_share, data.share_without_bos),
        saves=("mass",),
        direction=-1,
    ),
    Signal(
        name="head_agreement",
        label="head agreement",
        unit="mean correlation, -1 to 1",
        how="mean pairwise correlation of the heads over depth, mean over steps",
        value=lambda data: data.over_cells(signal.head_agreement, data.share),
        column=True,
        saves=("shares",),
        direction=-1,
    ),
    Signal(
        name="focus",
        label="focus, all heads",
        unit="fraction of the attention on system and user",
        how="mean over all heads of system / (system + user) at step 0",
        value=_focus,
        steps=_focus_by_step,
        column=True,
        saves=("focus",),
        direction=-1,
        windowed=False,
        absent="the runs have no focus: it takes a prompt with a known user turn",
        steps_absent=_NO_MASS,
    ),
    Signal(
        name="focus_important",
        label="focus, important heads",
        unit="standard deviations of benign prompts",
        how="the same over heads chosen without the fold",
        value=_focus_important,
        steps=_focus_important_by_step,
        saves=("focus",),
        direction=-1,
        windowed=False,
        of_chosen_heads=True,
        learn=learn_heads,
        reads="focus_heads",
        steps_absent=_NO_MASS,
    ),
    Signal(
        name="entropy",
        label="next-token entropy",
        unit="nats",
        how="mean over steps",
        value=lambda data: data.window_mean(data.logit_stats.get("entropy")),
        steps=_entropy_by_step,
        column=True,
        saves=("entropy",),
    ),
    Signal(
        name="top1",
        label="top-1 probability",
        unit="probability",
        how="mean over steps",
        value=lambda data: data.window_mean(data.logit_stats.get("top1")),
        column=True,
        compared=False,
    ),
    Signal(
        name="margin",
        label="top-2 margin",
        unit="probability",
        how="the most likely token's probability less the next one's, mean over steps",
        value=lambda data: data.window_mean(data.logit_stats.get("margin")),
        column=True,
        compared=False,
    ),
    Signal(
        name="novelty",
        label="novelty of the heads",
        unit="Mahalanobis distance to benign prompts",
        how="distance of the shares' log-odds, centred within each layer, from those of benign prompts",
        compared=False,
        windowed=False,
        saves=("logit_shares",),
        learn=learn_novelty,
        reads="logit_shares",
    ),
    Signal(
        name="readout",
        label="readout of the heads",
        unit="log-odds of an attack",
        how="L2 logistic regression on the shares' log-odds, centred within each layer",
        compared=False,
        windowed=False,
        saves=("logit_shares",),
        learn=learn_readout,
        reads="logit_shares",
    ),
    Signal(
        name="prompt_tokens",
        label="prompt length",
        unit="tokens",
        how="the whole prompt, system prompt and template included",
        length=True,
        windowed=False,
        log=True,
    ),
    Signal(
        name="answer_tokens",
        label="answer length",
        unit="tokens",
        how="as far as the answer was made",
        length=True,
        windowed=False,
    ),
    Signal(
        name="n_steps",
        label="number of steps",
        unit="steps",
        how="recorded steps: fewer if the answer ended",
        length=True,
        windowed=False,
        log=True,
    ),
):
    register(_entry)
