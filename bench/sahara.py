"""Sahara: headrift's rows of batches against transformers, one pass for a group of heads and a query.

    python bench/sahara.py [--queries 20] [--steps 2] [--r-main 1] [--sample 2] [--model DIR] [--short]

The whole search runs in headrift. After each of its blocks of heads the slow way takes some heads of the same block,
with the heads that are chosen by then, over all queries, so that a noisy machine slows both; their angles must be the
same. `lean` is the slow way without the language-model head, whose logits the released code computes and throws away.
"""

import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from safety_heads import Loop, new_report, open_engine, ratio_rows, ratios
from utils import Stopwatch, cell, spread


class Subspaces(Loop):
    """The slow way: last hidden states by transformers, angles by scipy."""

    def hidden(self, ids: list[int], lean: bool) -> np.ndarray:
        """The last hidden state at the last prompt token."""
        with self.torch.no_grad():
            if lean:
                states = self.model.model(self.torch.tensor([ids]), use_cache=False).last_hidden_state
            else:
                options = {"use_cache": False, "output_hidden_states": True}
                states = self.model(self.torch.tensor([ids]), **options).hidden_states[-1]
        return states[0, -1].double().numpy()

    def basis(self, queries: list[list[int]], group: list[tuple[int, int]], r_main: int, lean: bool) -> np.ndarray:
        with ExitStack() as ablations:
            for head in group:
                ablations.enter_context(self.ablated(*head))
            states = np.stack([self.hidden(ids, lean) for ids in queries], 1)
        return np.linalg.svd(states, full_matrices=False)[0][:, :r_main]


class Race:
    """The seconds of headrift's blocks and rows, and after each block the slow ways' turn."""

    def __init__(self, args, queries: list[list[int]]):
        self.loop, self.queries, self.r_main, self.sample = Subspaces(args.model), queries, args.r_main, args.sample
        self.blocks: list[dict] = []
        self.angles: list[dict] = []
        self.compared: list[dict] = []
        self.clean = self.loop.basis(queries, [], self.r_main, lean=True)
        self._rows, self._begun = 0, time.perf_counter()

    def on_rows(self, rows: int) -> None:
        self._rows += rows

    def on_block(self, step: int, block: dict) -> None:
        from scipy.linalg import subspace_angles

        from headrift.safety_heads.sahara import Step

        seconds = {"headrift": (time.perf_counter() - self._begun) / self._rows}
        if step > len(self.angles):
            self.angles.append({})
        self.angles[-1] |= block
        chosen = [Step.from_angles(angles).chosen for angles in self.angles[: step - 1]]
        heads = list(block)
        some = [heads[i] for i in np.linspace(0, len(heads) - 1, min(self.sample, len(heads))).astype(int)]
        for way in ("loop", "lean") if len(self.blocks) % 2 else ("lean", "loop"):
            with Stopwatch() as clock:
                bases = [self.loop.basis(self.queries, [*chosen, head], self.r_main, way == "lean") for head in some]
                expected = [np.rad2deg(subspace_angles(self.clean, basis)[::-1]) for basis in bases]
            seconds[way] = clock.seconds / (len(some) * len(self.queries))
        for head, angles in zip(some, expected):
            both = {"headrift": block[head].tolist(), "transformers": angles.tolist()}
            self.compared.append({"step": step, "head": list(head), **both})
        self.blocks.append({"step": step, "rows": self._rows, "seconds_a_row": seconds})
        print({"step": step, "rows": self._rows} | {way: round(s, 4) for way, s in seconds.items()}, flush=True)
        self._rows, self._begun = 0, time.perf_counter()


def evaluate(race: Race, steps: list) -> dict:
    from scipy.stats import spearmanr

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
        "blocks": race.blocks,
        **ratios({way: [block["seconds_a_row"][way] for block in race.blocks] for way in ("headrift", "loop", "lean")}),
        "largest_difference_degrees": float(np.abs(ours - slow).max()),
        "compared": race.compared,
        "steps": by_step,
    }


def table(report: dict) -> str:
    s, per = report["settings"], [block["seconds_a_row"] for block in report["blocks"]]
    steps = [
        [i, f"{step['chosen'][0]}:{step['chosen'][1]}", f"{sum(step['ranking'][0]['angles']):.3f}"]
        + [f"{step['rows']:,}", f"{step['seconds']:.0f}", f"{step['rows_a_second']:.1f}", step["compared_heads"]]
        + [f"{step['spearman']:.6f}"]
        for i, step in enumerate(report["steps"], 1)
    ]
    rows = [
        *([f"{way}, ms a row", cell(spread([1e3 * one[way] for one in per]))] for way in per[0]),
        *ratio_rows(report),
        ["largest difference, degrees", f"{report['largest_difference_degrees']:.1e}"],
    ]
    head = ["step", "chosen", "degrees", "rows", "seconds", "rows/s", "heads compared", "Spearman of these"]
    return utils.page(
        f"Sahara, {s['steps']} steps over {s['queries']} queries of {cell(s['prompt_tokens'], 0)} tokens, "
        f"{s['heads']} heads of {s['model']}, r_main {s['r_main']}, {s['dtype']}, {report['machine']['cores']} cores. "
        "The slow ways took their turns after each block of heads.",
        utils.markdown(head, steps),
        utils.markdown(["", ""], rows),
    )


def main() -> None:
    options = utils.Options(__doc__, "sahara")
    options.amount("queries", 20, 4, "queries")
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--r-main", type=int, default=1)
    options.add_argument("--sample", type=int, default=2, help="heads of a block that the slow ways take")
    args = options.parse()
    from headrift.safety_heads.sahara import SubspaceProbe, hidden_states_for, sahara

    with open_engine(args, lambda n: {"hidden_states": hidden_states_for(n)}) as (engine, queries, heads):
        # Compiled kernels, memory and threads are there before anything is timed.
        sahara(SubspaceProbe(engine, queries[:1]), heads[:2], 1)
        race = Race(args, queries)
        probe = SubspaceProbe(engine, queries, args.r_main, on_rows=race.on_rows)
        steps = sahara(probe, heads, args.steps, on_block=race.on_block)
        settings = {"steps": len(steps), "r_main": args.r_main, "heads": len(heads)}
        report = new_report(args, engine, queries, **settings) | evaluate(race, steps)
    utils.write(report, table(report), args.out)


if __name__ == "__main__":
    main()
