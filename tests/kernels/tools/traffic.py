"""Count the bytes that the Triton kernels move, tensor by tensor, in Triton's interpreter, without a GPU.

    python tests/kernels/tools/traffic.py [--out FILE.json]

Prints them with and without masses. A load counts where its mask is true, so what is read twice counts twice: this is
what a kernel requests, caches or not. `mended` repairs the interpreter's faults that would spoil results, for this
module and for the tests. Everything here needs TRITON_INTERPRET=1 in the environment before triton is imported; `main`
sets it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.cases import decode_case


class Traffic:
    """Bytes loaded and stored, by tensor name, and for some tensors how often each element was loaded."""

    def __init__(self, tensors: dict[str, torch.Tensor], per_element: tuple[str, ...] = ()):
        spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t), name) for name, t in tensors.items() if t.numel())
        self.starts = np.array([start for start, _, _ in spans], np.uint64)
        self.ends = np.array([end for _, end, _ in spans], np.uint64)
        self.names = [name for _, _, name in spans]
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.reads = {
            name: np.zeros(_extent(tensors[name]) // tensors[name].element_size(), int) for name in per_element
        }

    def add(self, counter: Counter[str], pointers: Any, mask: Any) -> None:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        addresses, valid = np.broadcast_arrays(np.asarray(pointers.data), np.asarray(mask.data))
        addresses = addresses[valid.astype(bool)].ravel().astype(np.uint64)
        if not addresses.size:
            return
        span = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        if (span < 0).any() or (addresses >= self.ends[span]).any():
            raise IndexError("a kernel touched memory outside of every tensor it was given")
        for i in np.unique(span):
            own = addresses[span == i]
            counter[self.names[i]] += own.size * size
            if counter is self.loaded and self.names[i] in self.reads:
                np.add.at(self.reads[self.names[i]], ((own - self.starts[i]) // np.uint64(size)).astype(np.int64), 1)

    def total(self, *names: str) -> int:
        """Bytes loaded and stored, of all tensors or of those named."""
        return sum(counter[name] for counter in (self.loaded, self.stored) for name in names or self.names)


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last, whatever its strides."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


@contextlib.contextmanager
def counted(tensors: dict[str, torch.Tensor], per_element: tuple[str, ...] = ()) -> Iterator[Traffic]:
    """Count what kernels launched inside move. `tensors` has to name every tensor they get."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    traffic = Traffic(tensors, per_element)
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        traffic.add(traffic.loaded, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        traffic.add(traffic.stored, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with _patched(Builder, create_masked_load=counted_load, create_masked_store=counted_store):
        yield traffic


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Mend Triton 3.9's interpreter, and make it 1.7 times as fast.

    It multiplies the bit patterns of bfloat16 operands, truncates float32 to bfloat16 and copies the bits of integers
    into it; its fp8 conversions go through tables of their own. Here all of them are torch's. A call of one device
    function by another patches triton's whole language each time; here once per launch. And Python 3.11 maps a new
    piece of its stack of frames whenever a call passes the last piece's end, and gives it back on return: where that
    end lies in a kernel's loop, half the time goes there. Here kernels run on a thread of their own, whose stack is
    short.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

    narrow = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    dot, cast, fp_to_fp = (getattr(InterpreterBuilder, name) for name in ("create_dot", "cast_impl", "create_fp_to_fp"))
    call, launch = InterpretedFunction.__call__, GridExecutor.__call__
    patched = set()

    def widened(handle):
        bits = np.ascontiguousarray(handle.data)
        signed = bits.view(np.int8 if bits.itemsize == 1 else np.int16)
        return torch.from_numpy(signed).view(narrow[handle.dtype.scalar]).float().numpy()

    def mended_dot(self, a, b, d, *rest):
        a, b = (TensorHandle(widened(x), tl.float32) if x.dtype.scalar in narrow else x for x in (a, b))
        return dot(self, a, b, d, *rest)

    def mended_cast(self, source, target, *rest):
        original = fp_to_fp if rest else cast
        if source.dtype.scalar == target.scalar or not {source.dtype.scalar, target.scalar} & set(narrow):
            return original(self, source, target, *rest)
        values = widened(source) if source.dtype.scalar in narrow else source.data.astype(np.float32)
        if target.scalar in narrow:
            numbers = torch.from_numpy(np.ascontiguousarray(values)).to(narrow[target.scalar])
            bits = numbers.view(torch.int8 if numbers.element_size() == 1 else torch.int16).numpy()
            return TensorHandle(bits.view(interpreter._get_np_dtype(target.scalar)), target.scalar)
        return TensorHandle(values.astype(interpreter._get_np_dtype(target.scalar)), target.scalar)

    def fast_call(self, *args, **kwargs):
        if self.fn in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn)
        return call(self, *args, **kwargs)

    def launch_here(*args, **kwargs):
        patched.clear()
        # NaN and inf in poisoned pages are what the tests put there
        with np.errstate(all="ignore"), torch.inference_mode():
            return launch(*args, **kwargs)

    def fast_launch(*args, **kwargs):
        return thread.submit(launch_here, *args, **kwargs).result()

    with (
        ThreadPoolExecutor(1) as thread,
        _patched(InterpreterBuilder, create_dot=mended_dot, cast_impl=mended_cast, create_fp_to_fp=mended_cast),
        _patched(InterpretedFunction, __call__=fast_call),
        _patched(GridExecutor, __call__=fast_launch),
    ):
        yield


@contextlib.contextmanager
def _patched(target: Any, **replacements: Any) -> Iterator[None]:
    originals = {name: getattr(target, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(target, name, replacement)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(target, name, original)


# The regions of a chat, as in aot.py: system, user, prompt.
CHATS = {
    512: ((5, 100), (105, 480), (0, 500)),
    2048: ((5, 400), (405, 2010), (0, 2030)),
    8192: ((5, 700), (705, 8160), (0, 8180)),
}
KV = ("key_cache", "value_cache")


def chat(context: int, **shape: Any) -> Any:
    """Two decode rows of one context length, both probed."""
    case = decode_case(np.random.default_rng(0), seq_lens=[context] * 2, unprobed=0.0, steps=64, poison=False, **shape)
    case.prompt_len[:] = CHATS[context][2][1]
    case.n_rows[:] = 64
    case.bounds[:] = torch.tensor(CHATS[context])
    return case


def decode_traffic(case: Any, splits: int, with_mass: bool, block_n: int = 64) -> Traffic:
    """Count one call; with several splits, of chunks so short that a row uses all of them."""
    from headrift_kernels.triton.decode_mass import SplitScratch, Tiles, decode_mass

    rows, heads, head_dim = case.query.shape
    output, mass = torch.empty(rows, heads, head_dim, dtype=case.query.dtype), case.empty_mass()
    scratch = SplitScratch.allocate(rows, heads, head_dim, 3, splits, "cpu") if splits > 1 else None
    with counted({"output": output, "mass": mass, **tensors_of(case), **tensors_of(scratch, "scratch_")}) as traffic:
        decode_mass(
            *(output, mass if with_mass else None, 1, *case.batch),
            scratch=scratch,
            tiles=Tiles(block_n, 4, 2, block_n),
            **case.how,
        )
    return traffic


def tensors_of(case: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a case or scratch, by name."""
    return {f"{prefix}{k}": x for k, x in (vars(case) if case else {}).items() if isinstance(x, torch.Tensor)}


def measure() -> list[dict[str, Any]]:
    """Decode with and without masses, over shapes of models, contexts and splits."""
    counts = []
    heads = {"SmolLM2-135M": (3, 3, 64), "Llama-3-8B": (8, 4, 128), "one head per KV head": (4, 1, 128)}
    for model, (kv_heads, group, head_dim) in heads.items():
        for context, splits in ((512, 1), (512, 2), (2048, 1), (2048, 8), (8192, 32)):
            case = chat(context, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=torch.bfloat16)
            plain, probed = (decode_traffic(case, splits, with_mass) for with_mass in (False, True))
            case.row_slot[:] = -1
            unprobed = decode_traffic(case, splits, True)
            counts.append(
                {
                    "shape": f"{model}: {kv_heads * group} heads / {kv_heads} KV heads of {head_dim}, bfloat16",
                    "context": context,
                    "splits": splits,
                    "kv_bytes": plain.total(*KV),
                    "kv_ratio": probed.total(*KV) / plain.total(*KV),
                    "all_bytes": plain.total(),
                    "all_ratio": probed.total() / plain.total(),
                    "unprobed_ratio": unprobed.total() / plain.total(),
                    "loaded": {"plain": dict(plain.loaded), "mass": dict(probed.loaded)},
                    "stored": {"plain": dict(plain.stored), "mass": dict(probed.stored)},
                }
            )
    return counts


def measure_replay() -> list[dict[str, Any]]:
    """The 12 measured queries of one row whose prompt of 2,036 and answer of 12 run in one prefill, in one block.

    V is not among the tensors: reading it would raise.
    """
    from headrift_kernels.triton.decode_mass import Tiles
    from headrift_kernels.triton.replay_mass import ReplayScratch, replay_mass

    counts = []
    for splits in (1, 4):
        case = decode_case(
            np.random.default_rng(0),
            seq_lens=[2048],
            query_lens=[2048],
            steps=16,
            unprobed=0.0,
            kv_heads=3,
            dtype=torch.bfloat16,
        )
        case.prompt_len[:], case.n_rows[:], case.bounds[:] = 2036, 16, torch.tensor(CHATS[2048])
        mass = case.empty_mass()
        scratch = ReplayScratch.allocate(1, 12, 9, 3, splits, "cpu") if splits > 1 else None
        tensors = {"mass": mass, **tensors_of(case), **tensors_of(scratch, "scratch_")}
        del tensors["value_cache"]
        with counted(tensors, per_element=("key_cache",)) as traffic:
            how = {**case.how, "scratch": scratch, "tiles": Tiles(64, 4, 2)}
            replay_mass(mass, 1, *case.replay_batch, most_queries=12, **how)
        needed = 2047 * case.key_cache.shape[2] * case.key_cache.shape[3] * case.key_cache.element_size()
        counts.append(
            {
                "splits": splits,
                "needed_key_bytes": needed,
                "key_ratio": traffic.loaded["key_cache"] / needed,
                "most_reads_of_a_key": int(traffic.reads["key_cache"].max()),
                "other_bytes": {k: n for k, n in (traffic.loaded + traffic.stored).items() if k != "key_cache"},
            }
        )
    return counts


def failures(decode: list[dict[str, Any]], replay: list[dict[str, Any]]) -> list[str]:
    """The bars that are not met, in words."""
    lines = []
    for row in decode:
        where = f"{row['shape']}, context {row['context']}, {row['splits']} splits"
        if row["kv_ratio"] != 1.0:
            lines.append(f"{where}: {row['kv_ratio']:.6f} times the bytes of K and V")
        if row["all_ratio"] > 1.01:
            lines.append(f"{where}: {row['all_ratio']:.4f} times all bytes")
    lines += [
        f"a replay in {row['splits']} splits reads {row['key_ratio']:.4f} times the attended keys"
        for row in replay
        if row["key_ratio"] != 1.0
    ]
    return lines


HEADER = ["shape", "context", "splits", "KV bytes", "KV with / without", "all bytes", "all with / without", "slot -1"]


def table(decode: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            *(
                row["shape"],
                f"{row['context']:,}",
                str(row["splits"]),
                f"{row['kv_bytes']:,}",
                f"{row['kv_ratio']:.6f}",
            ),
            *(f"{row['all_bytes']:,}", f"{row['all_ratio']:.4f}", f"{row['unprobed_ratio']:.6f}"),
        ]
        for row in decode
    ]


def replay_lines(replay: list[dict[str, Any]]) -> list[str]:
    return [
        f"Replay of 12 queries of one row, {row['splits']} split(s): {row['key_ratio']:.6f} times the attended "
        f"{row['needed_key_bytes']:,} bytes of K, no key over {row['most_reads_of_a_key']} time(s), no V; besides, "
        f"{sum(row['other_bytes'].values()):,} bytes: "
        + ", ".join(f"{name} {n:,}" for name, n in row["other_bytes"].items())
        for row in replay
    ]


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:]], environment)
    import triton
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers to this .json file, and the table beside it as .md")
    arguments = parser.parse_args()
    with mended():
        decode, replay = measure(), measure_replay()
    note = (
        "Bytes that decode attention loads and stores in 2 rows: masses of 3 regions, none, or no row probed (slot -1)."
    )
    printed = Table(*HEADER, caption=note)
    for row in table(decode):
        printed.add_row(*row)
    Console(width=180).print(printed)
    for line in [*replay_lines(replay), *(f"not met: {line}" for line in failures(decode, replay))]:
        print(line)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        numbers = {"triton": triton.__version__, "decode": decode, "replay": replay}
        arguments.out.write_text(json.dumps(numbers, indent=1) + "\n")
        lines = ["# Bytes moved, counted in Triton's interpreter", "", note, ""]
        lines += ["| " + " | ".join(cells) + " |" for cells in [HEADER, ["---"] * len(HEADER), *table(decode)]]
        lines += ["", *replay_lines(replay), "", *(failures(decode, replay) or ["All bars are met."]), ""]
        arguments.out.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
