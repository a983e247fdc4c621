"""Peak memory above the weights of one AttCT training step: `python _consistency_step.py headrift|eager MODEL TOKENS`.

headrift: the rows that matter, from the hooks; eager: the same loss from eager attention's full maps. One process each,
so that neither finds memory that the other left. Prints {"bytes": ..., "loss": ..., "gradient": ...}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrift.consistency import hooks, lora, losses
from headrift.consistency.pairs import Pair, PairRenderer, PairText

QUESTION = "Which of the planets of the solar system is the largest one, and which is the closest to the sun?"
NOISE = "The market opens early in the morning and many people come to buy bread and cheese. "


def pair_of(tokenizer: Any, tokens: int) -> Pair:
    """A pair whose wrapped prompt has about so many tokens, and no more."""
    renderer, n = PairRenderer(tokenizer), 1
    pair = None
    while pair is None or len(pair.wrapped_ids) <= tokens:
        made, pair = pair, renderer.render(PairText("p", "p", QUESTION, n * NOISE + QUESTION, core=QUESTION))
        n += 1
    assert made is not None
    return made


def main(how: str, folder: Path, tokens: int) -> None:
    pair = pair_of(AutoTokenizer.from_pretrained(folder), tokens)
    implementation = "sdpa" if how == "headrift" else "eager"
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation)
    if how == "headrift":
        hooks.install(base)
    model = lora.attach(base, 8, 16, 0)
    if how == "headrift":
        hooks.recompute_long(base)
    model.eval()
    # Everything is loaded and every library warm: what comes now is the step's.
    short = pair_of(AutoTokenizer.from_pretrained(folder), 140)
    step(how, model, short).backward()
    model.zero_grad(set_to_none=True)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, which loading made, is forgotten
    loss = step(how, model, pair)
    loss.backward()
    gradient = model.get_base_model().model.layers[3].self_attn.q_proj.lora_B["default"].weight.grad
    peak = 1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])
    print(json.dumps({"bytes": peak - before, "loss": float(loss.detach()), "gradient": float(gradient.norm())}))


def step(how: str, model: Any, pair: Pair) -> torch.Tensor:
    at, to, first = torch.from_numpy(pair.clean_positions), torch.from_numpy(pair.wrapped_positions), pair.first_query
    decoder = model.get_base_model().base_model
    n_layers = decoder.config.num_hidden_layers
    if how == "headrift":
        layers = frozenset(range(n_layers))
        with torch.no_grad(), model.disable_adapter():
            clean = hooks.run(decoder, pair.clean_ids, at[first:].tolist(), layers)
        wrapped = hooks.run(decoder, pair.wrapped_ids, to[first:].tolist(), layers)
        return losses.attct(wrapped.rows, clean.rows, to, at)
    with torch.no_grad(), model.disable_adapter():
        maps = decoder(torch.tensor([pair.clean_ids]), use_cache=False, output_attentions=True).attentions
    clean_rows = {layer: rows[0][:, at[first:]] for layer, rows in enumerate(maps)}
    maps = decoder(torch.tensor([pair.wrapped_ids]), use_cache=False, output_attentions=True).attentions
    return losses.attct({layer: rows[0][:, to[first:]] for layer, rows in enumerate(maps)}, clean_rows, to, at)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
