"""Sahara: headrift's rows of batches against transformers, one pass for a group of heads and a query.

The whole search runs in headrift. After each of its blocks of heads the slow way takes some heads of the same block,
with the heads that are chosen by then, over all queries, so that a noisy machine slows both; their angles must be the
same.
`lean` is the slow way without the language-model head, whose logits the released code computes and throws away.

    python bench/sahara.py [--queries 20] [--steps 2] [--r-main 1] [--sample 2] [--model DIR] [--short]

writes bench/results/sahara.json: machine, versions, raw samples, and what is computed from them.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from safety_heads import EPSILON, QUERIES, SHORT_HEADS, Loop
from utils import cell, median_ratio, spread


class Subspaces(Loop):
    """The slow way: last hidden states by transformers, angles by scipy."""

    def hidden(self, ids: list[int], lean: bool) -> np.ndarray:
        """The last hidden state at the last prompt token."""
        given = self.torch.tensor([ids])
        with self.torch.no_grad():
            if lean:
                states = self.model.model(given, use_cache=False).last_hidden_state
            else:
                states = self.model(given, use_cache=False, output_hidden_states=True).hidden_states[-1]
        return states[0, -1].double().numpy()

    def basis(self, queries: list[list[int]], group: list[tuple[int, int]], r_main: int, lean: bool) -> np.ndarray:
        with ExitStack() as ablations:
            for head in group:
                ablations.enter_context(self.ablated(*head))
            states = np.stack([self.hidden(ids, lean) for ids in queries], 1)
        return np.linalg.svd(states, full_matrices=False)[0][:, :r_main]


class Race:
    """The seconds of headrift's blocks and rows, and after each block the slow ways' turn."""

    def __init__(self, loop: Subspaces, queries: list[list[int]], r_main: int, sample: int):
        self.loop, self.queries, self.r_main, self.sample = loop, queries, r_main, sample
        self.blocks: list[dict] = []
        self.angles: list[dict] = []
        self.compared: list[dict] = []
        self.clean = loop.basis(queries, [], r_main, lean=True)
        self._rows = 0
        self._begun = time.perf_counter()

    def on_rows(self, rows: int) -> None:
        self._rows += rows

    def on_block(self, step: int, block: dict) -> None:
        from headrift.safety_heads.sahara import Step

        seconds = {"headrift": (time.perf_counter() - self._begun) / self._rows}
        if step > len(self.angles):
            self.angles.append({})
        self.angles[-1] |= block
        chosen = [Step.from_angles(angles).chosen for angles in self.angles[: step - 1]]
        heads = list(block)
        some = [heads[i] for i in np.linspace(0, len(heads) - 1, min(self.sample, len(heads))).astype(int)]
        for way in ("loop", "lean") if len(self.blocks) % 2 else ("lean", "loop"):
            begun = time.perf_counter()
            expected = [self._angles([*chosen, head], way) for head in some]
            seconds[way] = (time.perf_counter() - begun) / (len(some) * len(self.queries))
        for head, angles in zip(some, expected, strict=True):
            both = {"headrift": block[head].tolist(), "transformers": angles.tolist()}
            self.compared.append({"step": step, "head": list(head), **both})
        self.blocks.append({"step": step, "rows": self._rows, "seconds_a_row": seconds})
        print({"step": step, "rows": self._rows} | {way: round(s, 4) for way, s in seconds.items()}, flush=True)
        self._rows, self._begun = 0, time.perf_counter()

    def _angles(self, group: list[tuple[int, int]], way: str) -> np.ndarray:
        from scipy.linalg import subspace_angles

        ablated = self.loop.basis(self.queries, group, self.r_main, way == "lean")
        return np.rad2deg(subspace_angles(self.clean, ablated)[::-1])


def make_report(args, race: Race, steps: list, queries: list[list[int]], dtype: str) -> dict:
    from scipy.stats import spearmanr

    seconds = {way: [block["seconds_a_row"][way] for block in race.blocks] for way in race.blocks[0]["seconds_a_row"]}
    ours, slow = (np.array([one[way] for one in race.compared]) for way in ("headrift", "transformers"))
    of_step = np.array([one["step"] for one in race.compared])
    by_step = []
    for number, step in enumerate(steps, 1):
        blocks = [block for block in race.blocks if block["step"] == number]
        rows, taken = sum(b["rows"] for b in blocks), sum(b["rows"] * b["seconds_a_row"]["headrift"] for b in blocks)
        own = of_step == number
        by_step.append({
            "chosen": list(step.chosen), "rows": rows, "seconds": taken, "rows_a_second": rows / taken,
            "compared_heads": int(own.sum()),
            "spearman": float(spearmanr(ours[own].sum(1), slow[own].sum(1)).statistic),
            "ranking": [{"head": list(head), "angles": step.angles[head].tolist()} for head in step.ranking],
        })  # fmt: skip
    return {
        "machine": utils.host(),
        "versions": utils.versions(),
        "settings": {"model": args.model.name, "queries": len(queries), "steps": len(steps), "r_main": race.r_main,
                     "heads": len(steps[0].angles), "epsilon": EPSILON, "dtype": dtype,
                     "prompt_tokens": spread([len(ids) for ids in queries])},
        "blocks": race.blocks,
        "loop_over_headrift": median_ratio(seconds["loop"], seconds["headrift"]),
        "lean_over_headrift": median_ratio(seconds["lean"], seconds["headrift"]),
        "largest_difference_degrees": float(np.abs(ours - slow).max()),
        "compared": race.compared,
        "steps": by_step,
    }  # fmt: skip


def table(report: dict) -> list[str]:
    """Return the lines of the report's page."""
    s, per = report["settings"], [block["seconds_a_row"] for block in report["blocks"]]
    steps = [
        [i, f"{step['chosen'][0]}:{step['chosen'][1]}", f"{sum(step['ranking'][0]['angles']):.3f}"]
        + [f"{step['rows']:,}", f"{step['seconds']:.0f}", f"{step['rows_a_second']:.1f}", step["compared_heads"]]
        + [f"{step['spearman']:.6f}"]
        for i, step in enumerate(report["steps"], 1)
    ]
    ratios = [
        *([f"{way}, ms a row", cell(spread([1e3 * one[way] for one in per]))] for way in per[0]),
        ["loop / headrift", cell(report["loop_over_headrift"], 2)],
        ["lean loop / headrift", cell(report["lean_over_headrift"], 2)],
        ["largest difference, degrees", f"{report['largest_difference_degrees']:.1e}"],
    ]
    head = ["step", "chosen", "degrees", "rows", "seconds", "rows/s", "heads compared", "Spearman of these"]
    return [
        f"Sahara, {s['steps']} steps over {s['queries']} queries of {cell(s['prompt_tokens'], 0)} tokens, "
        f"{s['heads']} heads of {s['model']}, r_main {s['r_main']}, {s['dtype']}, {report['machine']['cores']} cores. "
        "The slow ways took their turns after each block of heads.",
        "",
        *utils.markdown(head, steps),
        "",
        *utils.markdown(["", ""], ratios),
    ]


def main() -> None:
    made = utils.parser(__doc__, "sahara")
    made.add_argument("--queries", type=int, default=20)
    made.add_argument("--steps", type=int, default=2)
    made.add_argument("--r-main", type=int, default=1)
    made.add_argument("--sample", type=int, default=2, help="heads of a block that the slow ways take")
    args = made.parse_args()
    from headrift.prepare import load_tokenizer
    from headrift.probed_engine import ProbedEngine
    from headrift.safety_heads.queries import prepare, read_rows
    from headrift.safety_heads.sahara import SubspaceProbe, hidden_states_for, sahara
    from headrift.safety_heads.ships import all_heads, sampled_heads

    rows = read_rows([str(QUERIES)], limit=4 if args.short else args.queries)
    queries = [query.token_ids for query in prepare(rows, load_tokenizer(str(args.model), False))]
    settings = {"kv_cache_memory_bytes": utils.KV_BYTES, "dtype": "float32"}
    options = {"ablation": True, "hidden_states": hidden_states_for(len(queries)), "engine_args": settings}
    with ProbedEngine(args.model, steps=0, regions=("system", "prompt"), **options) as engine:
        shape = engine.layers, engine.heads
        heads = sampled_heads(*shape, SHORT_HEADS) if args.short else all_heads(*shape)
        # Compiled kernels, memory and threads are there before anything is timed.
        sahara(SubspaceProbe(engine, queries[:1]), heads[:2], 1)
        race = Race(Subspaces(str(args.model)), queries, args.r_main, args.sample)
        probe = SubspaceProbe(engine, queries, args.r_main, on_rows=race.on_rows)
        steps = sahara(probe, heads, args.steps, on_block=race.on_block)
        report = make_report(args, race, steps, queries, engine.dtype)
    utils.write(report, table(report), utils.out_path(args))


if __name__ == "__main__":
    main()
