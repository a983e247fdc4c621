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

from _measure import KV_BYTES, ROOT, figures, machine, median_ratio, out_of, parser, spread, versions, write
from _model_math import Shapes, keys_attended

QUERIES = ROOT / "datasets/safety_topics.jsonl"
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
        """The query of one head all but nothing: its rotary embedding, which comes after, turns it and no more."""
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
        """The next-token distribution at the last prompt token."""
        with self.torch.no_grad():
            logits = self.model(self.torch.tensor([ids]), logits_to_keep=int(lean), use_cache=False).logits
        return self.torch.log_softmax(logits[0, -1].double(), -1)

    def ships(self, ids: list[int], heads: list[tuple[int, int]], lean: bool) -> np.ndarray:
        """The scores of the heads, in nats."""
        clean, scores = self.log_p(ids, lean), []
        for head in heads:
            with self.ablated(*head):
                scores.append(float((clean.exp() * (clean - self.log_p(ids, lean))).sum()))
        return np.array(scores)


def turns(args, engine, loop: Loop, queries: list[list[int]], heads: list[tuple[int, int]]) -> dict:
    """Seconds of each way for each block of queries, and the scores of both [queries, heads]."""
    from headrift.safety_heads.ships import ships

    at = tuple(np.transpose(heads))
    ways = {
        "headrift": lambda block: [scores[at] for scores in ships(engine, block, heads)],
        "loop": lambda block: [loop.ships(ids, heads, lean=False) for ids in block],
        "lean": lambda block: [loop.ships(ids, heads, lean=True) for ids in block],
    }
    for way in ways.values():  # compiled kernels, memory and threads are there before anything is timed
        way([queries[0][:8]])
    found: dict = {"seconds": {name: [] for name in ways}, "scores": {name: [] for name in ways}}
    for i, start in enumerate(range(0, len(queries), args.block)):
        block = queries[start : start + args.block]
        names = list(ways)
        for name in names[i % 3 :] + names[: i % 3]:
            begun = time.perf_counter()
            found["scores"][name] += ways[name](block)
            found["seconds"][name].append(time.perf_counter() - begun)
        print({name: round(seconds[-1], 1) for name, seconds in found["seconds"].items()}, flush=True)
    return found


def report_of(args, found: dict, queries: list[list[int]], n_heads: int, dtype: str) -> dict:
    from scipy.stats import spearmanr

    ours, loop = (np.array(found["scores"][name]) for name in ("headrift", "loop"))
    shapes = Shapes.of(args.model)
    rows = n_heads + 1
    flops = sum(rows * shapes.flops(len(ids), keys_attended(0, len(ids)), 1) for ids in queries)
    seconds = found["seconds"]
    return {
        "machine": machine(),
        "versions": versions(),
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


def table(report: dict) -> str:
    s, per = report["settings"], report["seconds_of_a_block"]
    rows = [
        f"SHIPS of {s['heads']} heads of {s['model']}, {s['queries']} queries of "
        f"{figures(s['prompt_tokens'], 0)} tokens, blocks of {s['block']} in turns, {s['dtype']}, "
        f"{report['machine']['cores']} cores.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name}, s a block | {figures(spread(per[name]))} |" for name in per),
        f"| loop / headrift | {figures(report['loop_over_headrift'], 2)} |",
        f"| lean loop / headrift | {figures(report['lean_over_headrift'], 2)} |",
        f"| headrift, GFLOP/s | {report['headrift_gflops_a_second']:.0f} |",
        f"| Spearman of the mean scores | {report['spearman_of_the_means']:.6f} |",
        f"| Spearman of a query's scores | {figures(report['spearman_of_a_query'], 6)} |",
        f"| largest difference, nats | {report['largest_difference_nats']:.1e} (scores reach "
        f"{report['largest_score_nats']:.2f}) |",
    ]
    return "\n".join(rows) + "\n"


def main() -> None:
    made = parser(__doc__, "safety_heads")
    made.add_argument("--queries", type=int, default=10)
    made.add_argument("--block", type=int, default=2, help="queries that a way has in its turn")
    args = made.parse_args()
    from headrift.preparing import load_tokenizer
    from headrift.probed_engine import ProbedEngine
    from headrift.safety_heads.queries import prepare, read_rows
    from headrift.safety_heads.ships import IN_FLIGHT, all_heads, sampled_heads

    rows = read_rows([str(QUERIES)], limit=4 if args.short else args.queries)
    queries = [query.token_ids for query in prepare(rows, load_tokenizer(str(args.model), False))]
    options = {"kv_cache_memory_bytes": KV_BYTES, "dtype": "float32"}
    with ProbedEngine(
        args.model, steps=0, regions=("system", "prompt"), ablation=True, references=IN_FLIGHT, engine_args=options
    ) as engine:
        shape = engine.layers, engine.heads
        heads = sampled_heads(*shape, SHORT_HEADS) if args.short else all_heads(*shape)
        found = turns(args, engine, Loop(str(args.model)), queries, heads)
        report = report_of(args, found, queries, len(heads), engine.dtype)
    write(report, table(report), out_of(args))


if __name__ == "__main__":
    main()
