"""How fast log rows go through reading, checking, the child process and writing, and whether memory stays flat.

    python bench/corpus.py [--rows 100000 --rows 1000000] [--only through|scored|ratios] [--model DIR]

through: synthetic rows (see _corpus_rows) through a whole job whose engine answers at once. scored: 20,000 of them with
a tiny random model and 2,000 with the demonstration model, and the share of the time in which the engine waited for
input. ratios: a shared system prompt with and without priming and small blocks, replay and generation, repeats. Without
--only: through. Writes bench/results/corpus.json; what is not measured now keeps its figures there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/corpus.json"
HERE = Path(__file__).resolve().parent


def through(n: int, folder: Path) -> dict:
    """A job of so many rows without an engine, in a process of its own."""
    given = folder / f"{n}.jsonl"
    subprocess.run([sys.executable, HERE / "_corpus_rows.py", given, str(n)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [sys.executable, HERE / "_corpus_job.py", given, folder / f"out-{n}"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    cpu = found["cpu_seconds"] + found["cpu_seconds_of_child"]
    found |= {"rows_per_second": n / found["seconds"], "rows_per_second_per_core": n / cpu}
    found["input_bytes"] = given.stat().st_size
    given.unlink()
    return found


def with_model(case: str, model: Path, n: int) -> dict:
    """A case of _corpus_scored."""
    command = [sys.executable, HERE / "_corpus_scored.py", case, model, str(n)]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


def make_tiny_model(folder: Path, model: Path, layers: int = 2, hidden: int = 128) -> Path:
    """Random layers with heads of 32, with another model's tokenizer and chat template."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64, intermediate_size=hidden, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="a run of so many rows; 100,000 and 1,000,000")
    parser.add_argument("--only", choices=["through", "scored", "ratios"], default="through")
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-135m-instruct")
    parser.add_argument("--scored", type=int, default=2000, help="rows with --model")
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["cores"] = os.cpu_count()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.only == "through":
            found["through"] = [through(n, folder) for n in sorted(args.rows or [100_000, 1_000_000])]
        elif args.only == "scored":
            tiny = make_tiny_model(folder / "tiny", args.model)
            found["scored"] = [
                with_model("scored", tiny, 20_000),
                with_model("scored", args.model, args.scored or 2000),
            ]
        else:
            cases = ["unshared", "shared", "generate", "replay", "repeats"]
            ratios = {case: with_model(case, args.model, 100) for case in cases}
            pairs = {"shared": "unshared", "replay": "generate"}
            for case, other in pairs.items():
                over = {of: ratios[other][of] / ratios[case][of] for of in ("seconds", "cpu_seconds")}
                ratios[f"{case}_over_{other}"] = over
            found["ratios"] = ratios
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
