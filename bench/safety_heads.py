"""SHIPS of all heads: headrift's rows of batches against one transformers pass a head, the same ranking or not.

The slow way is what the paper's released code does: one forward pass at batch 1 for each head and query, with the head
ablated by a hook. Both take turns on blocks of the same queries, so that a noisy machine slows both. `lean` is the slow
way without the logits of all positions but the last, which the released code computes and throws away.

    python bench/safety_heads.py [--queries 10] [--block 2] [--model DIR] [--short]

writes bench/results/safety_heads.json: machine, versions, raw samples, and what is computed from them.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from utils import Shapes, cell, keys_attended, median_ratio, spread

QUERIES = utils.ROOT / "datasets/safety_topics.jsonl"
EPSILON = 1e-5
SHORT_HEADS = 12


class Loop:
    """transformers, one pass at a time. For models whose query has no norm, such as Llama's."""

    def __init__(self, model: str):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.dim = self.model.model.layers[0].self_attn.head_dim

    @contextmanager
    def ablated(self, layer: int, head: int):
        """Ablate the query of one head: its rotary embedding, which comes after, only rotates it."""
        own = slice(head * self.dim, (head + 1) * self.dim)

        def scale(module, args, output):
            output[..., own] *= EPSILON
            return output

        handle = self.model.model.layers[layer].self_attn.q_proj.register_forward_hook(scale)
        try:
            yield
        finally:
            handle.remove()

    def log_p(self, ids: list[int], lean: bool):
        """Return the next-token log-probabilities at the last prompt token."""
        with self.torch.no_grad():
            logits = self.model(self.torch.tensor([ids]), logits_to_keep=int(lean), use_cache=False).logits
        return self.torch.log_softmax(logits[0, -1].double(), -1)

    def ships(self, ids: list[int], heads: list[tuple[int, int]], lean: bool) -> np.ndarray:
        """Return the scores of the heads, in nats."""
        clean, scores = self.log_p(ids, lean), []
        for head in heads:
            with self.ablated(*head):
                scores.append(float((clean.exp() * (clean - self.log_p(ids, lean))).sum()))
        return np.array(scores)


def race(args, engine, loop: Loop, queries: list[list[int]], heads: list[tuple[int, int]]) -> dict:
    """Return the seconds of each way for each block of queries, and the scores of both [queries, heads]."""
    from headrift.safety_heads.ships import ships

    at = tuple(np.transpose(heads))
    ways = {
        "headrift": lambda block: [scores[at] for scores in ships(engine, block, heads)],
        "loop": lambda block: [loop.ships(ids, heads, lean=False) for ids in block],
        "lean": lambda block: [loop.ships(ids, heads, lean=True) for ids in block],
    }
    for way in ways.values():  # compiled kernels, memory and threads exist before anything is timed
        way([queries[0][:8]])
    results: dict = {"seconds": {name: [] for name in ways}, "scores": {name: [] for name in ways}}
    for i, start in enumerate(range(0, len(queries), args.block)):
        block, names = queries[start : start + args.block], list(ways)
        for name in names[i % 3 :] + names[: i % 3]:
            begin = time.perf_counter()
            results["scores"][name] += ways[name](block)
            results["seconds"][name].append(time.perf_counter() - begin)
        print({name: round(seconds[-1], 1) for name, seconds in results["seconds"].items()}, flush=True)
    return results


def make_report(args, results: dict, queries: list[list[int]], n_heads: int, dtype: str) -> dict:
    from scipy.stats import spearmanr

    ours, loop = (np.array(results["scores"][name]) for name in ("headrift", "loop"))
    shapes = Shapes.read(args.model)
    rows = n_heads + 1
    flops = sum(rows * shapes.flops(len(ids), keys_attended(0, len(ids)), 1) for ids in queries)
    seconds = results["seconds"]
    return {
        "machine": utils.host(),
        "versions": utils.versions(),
        "settings": {"model": args.model.name, "queries": len(queries), "block": args.block, "heads": n_heads,
                     "epsilon": EPSILON, "dtype": dtype, "prompt_tokens": spread([len(ids) for ids in queries])},
        "seconds_of_a_block": seconds,
        "loop_over_headrift": median_ratio(seconds["loop"], seconds["headrift"]),
        "lean_over_headrift": median_ratio(seconds["lean"], seconds["headrift"]),
        # Of all tokens, had none been cached: at most what was computed.
        "headrift_gflops_a_second": flops / sum(seconds["headrift"]) / 1e9,
        "spearman_of_the_means": float(spearmanr(ours.mean(0), loop.mean(0)).statistic),
        "spearman_of_a_query": spread([float(spearmanr(a, b).statistic) for a, b in zip(ours, loop, strict=True)]),
        "largest_difference_nats": float(np.abs(ours - loop).max()),
        "largest_score_nats": float(loop.max()),
        "mean_scores": {"headrift": ours.mean(0).tolist(), "loop": loop.mean(0).tolist()},
    }  # fmt: skip


def table(report: dict) -> list[str]:
    """Return the lines of the report's page."""
    s, per = report["settings"], report["seconds_of_a_block"]
    rows = [
        *([f"{name}, s a block", cell(spread(per[name]))] for name in per),
        ["loop / headrift", cell(report["loop_over_headrift"], 2)],
        ["lean loop / headrift", cell(report["lean_over_headrift"], 2)],
        ["headrift, GFLOP/s", f"{report['headrift_gflops_a_second']:.0f}"],
        ["Spearman of the mean scores", f"{report['spearman_of_the_means']:.6f}"],
        ["Spearman of a query's scores", cell(report["spearman_of_a_query"], 6)],
        ["largest difference, nats", "{:.1e} (scores reach {:.2f})".format(
            report["largest_difference_nats"], report["largest_score_nats"])],
    ]  # fmt: skip
    return [
        f"SHIPS of {s['heads']} heads of {s['model']}, {s['queries']} queries of {cell(s['prompt_tokens'], 0)} tokens, "
        f"blocks of {s['block']} in turns, {s['dtype']}, {report['machine']['cores']} cores.",
        "",
        *utils.markdown(["", ""], rows),
    ]


def main() -> None:
    made = utils.parser(__doc__, "safety_heads")
    made.add_argument("--queries", type=int, default=10)
    made.add_argument("--block", type=int, default=2, help="queries that a way has in its turn")
    args = made.parse_args()
    from headrift.prepare import load_tokenizer
    from headrift.probed_engine import ProbedEngine
    from headrift.safety_heads.queries import prepare, read_rows
    from headrift.safety_heads.ships import IN_FLIGHT, all_heads, sampled_heads

    rows = read_rows([str(QUERIES)], limit=4 if args.short else args.queries)
    queries = [query.token_ids for query in prepare(rows, load_tokenizer(str(args.model), False))]
    options = {"kv_cache_memory_bytes": utils.KV_BYTES, "dtype": "float32"}
    with ProbedEngine(
        args.model, steps=0, regions=("system", "prompt"), ablation=True, references=IN_FLIGHT, engine_args=options
    ) as engine:
        shape = engine.layers, engine.heads
        heads = sampled_heads(*shape, SHORT_HEADS) if args.short else all_heads(*shape)
        results = race(args, engine, Loop(str(args.model)), queries, heads)
        report = make_report(args, results, queries, len(heads), engine.dtype)
    utils.write(report, table(report), utils.out_path(args))


if __name__ == "__main__":
    main()
