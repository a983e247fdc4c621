"""SHIPS of all heads: headrift's rows of batches against one transformers pass a head, the same ranking or not.

    python bench/safety_heads.py [--queries 10] [--block 2] [--model DIR] [--short]

The slow way is what the paper's released code does: one forward pass at batch 1 for each head and query, with the head
ablated by a hook. Both take turns on blocks of the same queries, so that a noisy machine slows both. `lean` is the slow
way without the logits of all positions but the last, which the released code computes and throws away.
"""

import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import utils
from utils import Shapes, Stopwatch, cell, keys_attended, median_ratio, spread

EPSILON = 1e-5


class Loop:
    """transformers, one pass at a time. For models whose query has no norm, such as Llama's."""

    def __init__(self, model: Path):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
        self.dim = self.model.model.layers[0].self_attn.head_dim

    @contextmanager
    def ablated(self, layer: int, head: int):
        """Ablate the query of one head: its rotary embedding, which comes after, only rotates it."""

        def scale(module, args, output):
            output[..., head * self.dim : (head + 1) * self.dim] *= EPSILON
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


@contextmanager
def open_engine(args, options_for=lambda n_queries: {}):
    """headrift's engine for ablations, the queries' token ids, and the (layer, head) to ablate."""
    from headrift.prepare import load_tokenizer
    from headrift.probed_engine import ProbedEngine
    from headrift.safety_heads.jobs import prepare, read_rows
    from headrift.safety_heads.ships import all_heads, sampled_heads

    rows = read_rows([str(utils.ROOT / "datasets/safety_topics.jsonl")], limit=args.queries)
    queries = [query.token_ids for query in prepare(rows, load_tokenizer(str(args.model), False))]
    options = {"regions": ("system", "prompt"), "ablation": True, **options_for(len(queries))}
    settings = {"kv_cache_memory_bytes": utils.KV_BYTES, "dtype": "float32"}
    with ProbedEngine(args.model, steps=0, engine_args=settings, **options) as engine:
        shape = engine.layers, engine.heads
        yield engine, queries, sampled_heads(*shape, 12) if args.short else all_heads(*shape)


def new_report(args, engine, queries: list[list[int]], **settings) -> dict:
    settings |= {"epsilon": EPSILON, "dtype": engine.dtype, "prompt_tokens": spread([len(ids) for ids in queries])}
    settings = {"model": args.model.name, "queries": len(queries), **settings}
    return {"machine": utils.host(), "versions": utils.versions(), "settings": settings}


def ratios(seconds: dict[str, list[float]]) -> dict:
    return {f"{way}_over_headrift": median_ratio(seconds[way], seconds["headrift"]) for way in ("loop", "lean")}


def race(args, engine, queries: list[list[int]], heads: list[tuple[int, int]]) -> dict:
    """Return the seconds of each way for each block of queries, and the scores of both [queries, heads]."""
    from headrift.safety_heads.ships import ships

    at, loop = tuple(np.transpose(heads)), Loop(args.model)
    ways = {
        "headrift": lambda block: [scores[at] for scores in ships(engine, block, heads)],
        "loop": lambda block: [loop.ships(ids, heads, lean=False) for ids in block],
        "lean": lambda block: [loop.ships(ids, heads, lean=True) for ids in block],
    }
    for way in ways.values():  # compiled kernels, memory and threads exist before anything is timed
        way([queries[0][:8]])
    results = {"seconds": {name: [] for name in ways}, "scores": {name: [] for name in ways}}
    for i, start in enumerate(range(0, len(queries), args.block)):
        block, names = queries[start : start + args.block], list(ways)
        for name in names[i % 3 :] + names[: i % 3]:
            with Stopwatch() as clock:
                results["scores"][name] += ways[name](block)
            results["seconds"][name].append(clock.seconds)
        print({name: round(seconds[-1], 1) for name, seconds in results["seconds"].items()}, flush=True)
    return results


def evaluate(results: dict, queries: list[list[int]], n_heads: int, shapes: Shapes) -> dict:
    from scipy.stats import spearmanr

    ours, loop = (np.array(results["scores"][name]) for name in ("headrift", "loop"))
    flops = sum((n_heads + 1) * shapes.flops(len(ids), keys_attended(0, len(ids)), 1) for ids in queries)
    return {
        "seconds_of_a_block": results["seconds"],
        **ratios(results["seconds"]),
        # Of all tokens, had none been cached: at most what was computed.
        "headrift_gflops_a_second": flops / sum(results["seconds"]["headrift"]) / 1e9,
        "spearman_of_the_means": float(spearmanr(ours.mean(0), loop.mean(0)).statistic),
        "spearman_of_a_query": spread([float(spearmanr(a, b).statistic) for a, b in zip(ours, loop)]),
        "largest_difference_nats": float(np.abs(ours - loop).max()),
        "largest_score_nats": float(loop.max()),
        "mean_scores": {"headrift": ours.mean(0).tolist(), "loop": loop.mean(0).tolist()},
    }


def ratio_rows(report: dict) -> list[list[str]]:
    names = {"loop / headrift": "loop_over_headrift", "lean loop / headrift": "lean_over_headrift"}
    return [[shown, cell(report[name], 2)] for shown, name in names.items()]


def table(report: dict) -> str:
    s, difference = report["settings"], "{largest_difference_nats:.1e} (scores reach {largest_score_nats:.2f})"
    rows = [
        *([f"{name}, s a block", cell(spread(seconds))] for name, seconds in report["seconds_of_a_block"].items()),
        *ratio_rows(report),
        ["headrift, GFLOP/s", f"{report['headrift_gflops_a_second']:.0f}"],
        ["Spearman of the mean scores", f"{report['spearman_of_the_means']:.6f}"],
        ["Spearman of a query's scores", cell(report["spearman_of_a_query"], 6)],
        ["largest difference, nats", difference.format(**report)],
    ]
    return utils.page(
        f"SHIPS of {s['heads']} heads of {s['model']}, {s['queries']} queries of {cell(s['prompt_tokens'], 0)} tokens, "
        f"blocks of {s['block']} in turns, {s['dtype']}, {report['machine']['cores']} cores.",
        utils.markdown(["", ""], rows),
    )


def main() -> None:
    options = utils.Options(__doc__, "safety_heads")
    options.amount("queries", 10, 4, "queries")
    options.add_argument("--block", type=int, default=2, help="queries that a way has in its turn")
    args = options.parse()
    from headrift.safety_heads.ships import IN_FLIGHT

    with open_engine(args, lambda n: {"references": IN_FLIGHT}) as (engine, queries, heads):
        results = race(args, engine, queries, heads)
        report = new_report(args, engine, queries, block=args.block, heads=len(heads))
    report |= evaluate(results, queries, len(heads), Shapes.read(args.model))
    utils.write(report, table(report), args.out)


if __name__ == "__main__":
    main()
