"""Compile every Triton kernel for GPUs that are absent, and show what taking masses costs in the machine code.

    python tests/kernels/tools/aot.py [--out FILE.json] [--quick] [--target sm_90]

Prints registers, spills, shared memory, programs per multiprocessor and the instructions of the loop over K and V, with
and without masses. Nothing is timed. Does not work with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import sass

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Bytes of shared memory per multiprocessor; a program takes 1 KiB more than it asks for. 65,536 registers each.
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
# The regions of a chat: system and user without the template around them, and the prompt. Context -> bounds.
CHATS = {
    512: ((5, 100), (105, 480), (0, 500)),
    2048: ((5, 400), (405, 2010), (0, 2030)),
}
BARS = {512: 1.25, 2048: 1.10}
# Programs per multiprocessor of kernels that keep one fewer than without masses, only under Triton 3.7.
EXCEPTIONS_OF_3_7 = {"sm_90 decode D=64 bf16 entropy R=3": 3, "sm_90 decode D=64 bf16 R=8": 3}
# Queries and splits of a replay's kernels.
REPLAYS = ((1, 1), (16, 1), (16, 8))
FLAGS = ("MASS", "LAST_TOKENS", "ENTROPY", "WINDOW", "SOFTCAP", "ALIBI", "SINKS", "FP8")
TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Shape:
    """One compilation of one kernel, for 32 heads over 8 KV heads and pages of 16.

    queries: the most that a row measures in one call of `replay`.
    """

    kernel: str
    head_dim: int = 128
    dtype: str = "bf16"
    cache: str = ""
    regions: int = 3
    splits: int = 1
    queries: int = 16
    flags: frozenset[str] = frozenset({"MASS"})

    @property
    def name(self) -> str:
        options = [f.lower().replace("_", " ") for f in FLAGS if f in self.flags and f not in ("MASS", "FP8")]
        types = self.dtype + (f"+{self.cache}" if self.cache else "")
        return " ".join([f"D={self.head_dim}", types, *options, *self._how()])

    def _how(self) -> list[str]:
        queries = ["1 query" if self.queries == 1 else f"{self.queries} queries"] if "replay" in self.kernel else []
        return queries + (["split"] if self.splits > 1 else [])


@dataclass
class Compiled:
    """What came out. Registers and spilled bytes a thread (gfx942: registers), shared memory in bytes a program."""

    shape: Shape
    target: str
    registers: int
    spills: int
    shared: int
    warps: int
    block_n: int
    programs: int | None = None
    code: sass.Code | None = None
    failed: str = ""
    ratios: dict[int, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.target} {self.shape.kernel} {self.shape.name} R={self.shape.regions}"


def constants(shape: Shape, hip: bool) -> tuple[Any, dict[str, Any], dict[str, str], int, int]:
    """The kernel, its constexprs, its pointers' types, and the warps and stages that its launcher would choose."""
    import triton

    from headrift_kernels.triton import decode_kernels, decode_mass, logit_stats, replay_mass

    types = dict.fromkeys(("query_ptr", "output_ptr", "logits_ptr"), shape.dtype)
    types |= dict.fromkeys(("key_ptr", "value_ptr"), shape.cache or shape.dtype)
    integers = ("block_table", "seq_lens", "row_slot", "row_step", "prompt_len", "n_rows", "bounds", "query_start")
    types |= dict.fromkeys((f"{name}_ptr" for name in integers), "i32")
    if shape.kernel == "logits":
        return logit_stats.logit_statistics_kernel, {"BLOCK": 2048}, types, 8, 3
    sizes = TYPES[shape.dtype].itemsize, TYPES[shape.cache or shape.dtype].itemsize
    if "replay" in shape.kernel:
        block_m = replay_mass.block_rows(4, shape.queries)
        tiles = replay_mass.replay_tiles(block_m, *sizes, hip)
    else:
        block_m, tiles = 16, decode_mass.tiles_for(shape.head_dim, *sizes, hip)
    constexprs = {
        **{flag: flag in shape.flags for flag in FLAGS},
        "HEADS": 32,
        "REGIONS": shape.regions,
        "WIDTH": triton.next_power_of_2(shape.regions),
        "HEAD_DIM": shape.head_dim,
        "BLOCK_D": triton.next_power_of_2(shape.head_dim),
        "GROUP": 4,
        "PAGE": 16,
        "BLOCK_M": block_m,
        "BLOCK_N": tiles.block_n,
        "SPLIT": shape.splits > 1,
        "CHUNK": tiles.chunk,
        "BLOCK_S": decode_mass.MOST_SPLITS,
    }
    kernels = {
        "decode": decode_kernels.decode_kernel,
        "combine": decode_kernels.combine_kernel,
        "replay": replay_mass.replay_kernel,
        "replay combine": replay_mass.replay_combine_kernel,
    }
    warps, stages = (4, 3) if "combine" in shape.kernel else (tiles.num_warps, tiles.num_stages)
    return kernels[shape.kernel], constexprs, types, warps, stages


def absent(shape: Shape) -> set[str]:
    """The pointers that the launcher passes as None."""
    names = set()
    if "MASS" not in shape.flags:
        names |= {"mass_ptr", "row_slot_ptr", "prompt_len_ptr", "n_rows_ptr", "bounds_ptr"}
    if shape.splits == 1:
        names |= {"part_acc_ptr", "part_stat_ptr", "part_mass_ptr"}
    for flag, pointers in {
        "ENTROPY": ("entropy_ptr",),
        "ALIBI": ("slopes_ptr",),
        "SINKS": ("sinks_ptr",),
        "FP8": ("k_scale_ptr", "v_scale_ptr"),
    }.items():
        if flag not in shape.flags:
            names |= set(pointers)
    if "LAST_TOKENS" not in shape.flags and "replay" not in shape.kernel:
        names.add("query_start_ptr")
    return names


def compile_kernel(shape: Shape, target: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    hip = target.startswith("gfx")
    kernel, constexprs, types, warps, stages = constants(shape, hip)
    none = absent(shape)
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constexprs or name in none:
            signature[name], values[name] = "constexpr", constexprs.get(name)
        elif name.endswith("_ptr"):
            signature[name] = "*" + types.get(name, "fp32")
        else:
            signature[name] = "fp32" if name in ("scale", "softcap") else "i32"
        parameter = kernel.params[i]
        free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if signature[name] != "constexpr" and not free and (name.startswith("stride") or name.endswith("_ptr")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    if shape.kernel == "logits":
        signature["logits_ptr"] = "*" + shape.dtype
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    block_n = constexprs.get("BLOCK_N", 0)
    try:
        built = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if "not supported" in line), type(error).__name__)
        return Compiled(shape, target, 0, 0, 0, warps, block_n, failed=reason)
    shared = built.metadata.shared
    if hip:
        counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", built.asm["amdgcn"]))
        registers, spills = int(counts["vgpr_count"]), int(counts["vgpr_spill_count"])
        # a program's waves spread over the four SIMDs of a compute unit, of 512 VGPRs a lane each
        by_registers = 512 // (-(-registers // 8) * 8) * 4 // warps
        by_memory = 65536 // max(shared, 1)
        return Compiled(shape, target, registers, spills, shared, warps, block_n, min(by_registers, by_memory))
    registers, spills = sass.resources(built.asm["cubin"])
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    programs = min(by_registers, SHARED[target] // (shared + 1024), 64 // warps, 32)
    code = sass.disassemble(built.asm["cubin"])
    return Compiled(shape, target, registers, spills, shared, warps, block_n, programs, code)


def tiles_of(bounds: tuple[tuple[int, int], ...], n: int, block_n: int) -> list[int | None]:
    """For each tile of the decode kernel: None where it holds no bound, otherwise the masked sums it takes."""
    sums: list[int | None] = []
    run_start = 0
    for tile in range(0, n, block_n):
        end = min(tile + block_n, n)
        if any(run_start < bound < end for region in bounds for bound in region):
            sums.append(sum(any(tile < bound < end for bound in region) for region in bounds))
            run_start = end
        else:
            sums.append(None)
    return sums


def executed(mass: Compiled, plain: Compiled, bounds: tuple[tuple[int, int], ...], n: int) -> float:
    """Instructions of the loop over K and V, each turn as long as the kernel makes it there, with / without masses."""
    assert mass.code is not None
    assert plain.code is not None
    turns = mass.code.turns
    base, most = turns[0].counts["shuffles"], turns[-1].counts["shuffles"]
    per_sum = (most - base) // mass.shape.regions
    longest = {
        k: max(t.instructions for t in turns[1:] if t.counts["shuffles"] == base + k * per_sum) for k in range(4)
    }
    tiles = tiles_of(bounds, n, mass.block_n)
    taken = sum(turns[0].instructions if sums is None else longest[sums] for sums in tiles)
    return taken / (len(tiles) * plain.code.turns[-1].instructions)


def worst(n: int, block_n: int) -> tuple[tuple[int, int], ...]:
    """Bounds of three regions in as many tiles as they can be in."""
    at = [min(i * n // 5 + 1, n - 1) for i in range(5)]
    return ((at[0], at[1]), (at[2], at[3]), (0, at[4]))


def shapes(quick: bool) -> list[Shape]:
    """Without and with masses for each; `quick` leaves out what differs by options only."""
    mass = frozenset({"MASS"})
    chosen = []
    for head_dim in (64, 128) if quick else (64, 80, 96, 128, 256):
        chosen += [Shape("decode", head_dim, flags=flags) for flags in (frozenset[str](), mass)]
    last_tokens = mass | {"LAST_TOKENS"}
    variants: list[dict[str, Any]] = [{"splits": 16}, {"splits": 16, "flags": last_tokens}]
    if not quick:
        variants += [{"dtype": "fp16"}, {"dtype": "fp32"}, {"flags": last_tokens}]
        variants += [{"flags": mass | {flag}} for flag in ("WINDOW", "SOFTCAP", "ALIBI", "SINKS")]
    variants += [{"cache": cache, "flags": mass | {"FP8"}} for cache in ("fp8e4nv", "fp8e5")]
    for head_dim in (64, 128):
        for variant in variants:
            flags = variant.get("flags", mass)
            chosen += [Shape("decode", head_dim, **{**variant, "flags": f}) for f in (flags - mass, flags)]
        chosen.append(Shape("decode", head_dim, flags=mass | {"ENTROPY"}))
        chosen.append(Shape("decode", head_dim, regions=8))
        chosen.append(Shape("combine", head_dim, splits=16, flags=mass | {"ENTROPY"}))
        chosen += [Shape("replay", head_dim, queries=queries, splits=splits) for queries, splits in REPLAYS]
        chosen.append(Shape("replay combine", head_dim, splits=16, flags=mass | {"ENTROPY"}))
    every = mass | {"FP8", "ENTROPY", "WINDOW", "SOFTCAP", "ALIBI", "SINKS"}
    chosen.append(Shape("replay", 128, cache="fp8e5", flags=every))
    chosen += [Shape("logits", 0, dtype=dtype) for dtype in ("fp32", "bf16")]
    return chosen


def measure(targets: list[str], quick: bool = False) -> list[Compiled]:
    """Everything compiled; decode kernels with masses compared with the same kernel without."""
    compiled = []
    for target in targets:
        plain: dict[Shape, Compiled] = {}
        for shape in shapes(quick):
            built = compile_kernel(shape, target)
            compiled.append(built)
            if shape.kernel != "decode" or built.code is None:
                continue
            if "MASS" not in shape.flags:
                plain[shape] = built
            elif shape.regions == 3:
                bare = replace(shape, flags=shape.flags - {"MASS", "ENTROPY"})
                built.ratios = {n: executed(built, plain[bare], bounds, n) for n, bounds in CHATS.items()}
                built.ratios |= {-n: executed(built, plain[bare], worst(n, built.block_n), n) for n in CHATS}
    return compiled


def failures(compiled: list[Compiled]) -> list[str]:
    """The bars that are not met, in words."""
    lines = []
    for c in compiled:
        if c.failed:
            lines.append(f"{c.label}: not compiled ({c.failed})")
            continue
        if c.spills and c.shape.head_dim in (64, 128):
            lines.append(f"{c.label}: {c.spills} bytes spilled")
        if "ENTROPY" not in c.shape.flags:
            lines += [
                f"{c.label}: {c.ratios[n]:.3f} at context {n} (bar {bar})"
                for n, bar in BARS.items()
                if c.ratios.get(n, 0) > bar
            ]
    return lines + [line for line, excepted in programs_lost(compiled) if not excepted]


def exceptions(compiled: list[Compiled]) -> list[str]:
    """The programs per multiprocessor that masses are known to cost, in words: see `programs_lost`."""
    return [line for line, excepted in programs_lost(compiled) if excepted]


def programs_lost(compiled: list[Compiled]) -> list[tuple[str, bool]]:
    """Decode kernels that masses cost programs per multiprocessor, in words, and whether that is an exception.

    With an fp8 cache, whose conversions fill the registers, one program is: no tile, warps and stages keep it under
    every Triton. The others are in EXCEPTIONS_OF_3_7.
    """
    import triton

    known = EXCEPTIONS_OF_3_7 if triton.__version__.startswith("3.7.") else {}
    plain = {
        (c.target, c.shape.name): c.programs or 0
        for c in compiled
        if c.shape.kernel == "decode" and "MASS" not in c.shape.flags
    }
    lines = []
    for c in compiled:
        bare = plain.get((c.target, c.shape.name.replace(" entropy", "")), 0)
        if c.shape.kernel == "decode" and c.programs and c.programs < bare:
            line = f"{c.label}: {c.programs} programs per multiprocessor, {bare} without masses"
            fp8 = "FP8" in c.shape.flags and c.programs == bare - 1
            lines.append((line, fp8 or known.get(c.label) == c.programs))
    return lines


def rows(compiled: list[Compiled]) -> list[list[str]]:
    """The table: one line for each compilation."""
    lines = []
    for c in compiled:
        turns = c.code.turns if c.code else ()
        tile = str(turns[0].instructions) if turns else "-"
        bound = ""
        if len(turns) > 1 and c.shape.kernel == "decode":
            none = [t.instructions for t in turns[1:] if t.counts["shuffles"] == turns[0].counts["shuffles"]]
            bound = f"{max(none, default=0)}..{turns[-1].instructions}"
        counts = turns[0].counts if turns else {}
        memory = (
            "/".join(str(counts[k]) for k in ("global_loads", "global_stores", "mma", "shuffles")) if counts else "-"
        )
        lines.append(
            [
                c.target,
                c.shape.kernel,
                c.shape.name if c.shape.head_dim else c.shape.dtype,
                str(c.shape.regions) if "MASS" in c.shape.flags and c.shape.kernel != "logits" else "-",
                *([c.failed, "", "", "", "", "", ""] if c.failed else [str(c.registers), str(c.spills), str(c.shared)]),
                *([] if c.failed else [str(c.programs or "-"), tile, bound, memory]),
                *(f"{c.ratios[n]:.3f}" if n in c.ratios else "" for n in (512, 2048, -512, -2048)),
            ]
        )
    return lines


HEADER = ["target", "kernel", "shape", "R", "registers", "spilled B", "shared B", "programs/SM", "instr/tile"]
HEADER += ["with a bound", "ld/st/mma/shfl", "x at 512", "x at 2048", "worst 512", "worst 2048"]
NOTE = """\
Compiled by triton {version} for machines that are not here: nothing is timed. `x at N`: instructions executed in the
loop over K and V with masses of R=3 regions of a chat (system, user, prompt), over those without; each tile as long as
its path through the SASS. `worst`: the five inner bounds in five different tiles. `with a bound`: a tile that holds a
region bound, with no masked sum and with one for every region. `programs/SM`: by registers and shared memory (gfx942:
VGPRs and LDS). `replay`: the measured queries of a prefill row, from K alone, 1 or up to 16 a tile.
"""


def markdown(compiled: list[Compiled], note: str) -> str:
    lines = [" | ".join(cells) for cells in [HEADER, ["---"] * len(HEADER), *rows(compiled)]]
    verdict = [] if failures(compiled) else ["", "All bars are met."]
    for title, bars in {
        "Bars not met, or not compiled:": failures(compiled),
        "Exceptions:": exceptions(compiled),
    }.items():
        if bars:
            verdict += ["", title, "", *(f"- {line}" for line in bars)]
    return "\n".join(
        ["# The Triton kernels as machine code", "", note, *(f"| {line} |" for line in lines), *verdict, ""]
    )


def main() -> None:
    import triton
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers to this .json file, and the table beside it as .md")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    arguments = parser.parse_args()
    compiled = measure(arguments.target or list(TARGETS), arguments.quick)
    note = NOTE.format(version=triton.__version__)
    table = Table(*HEADER, caption=note, row_styles=["", "dim"])
    for row in rows(compiled):
        table.add_row(*row)
    Console(width=220).print(table)
    for line in failures(compiled):
        print("not met:", line)
    for line in exceptions(compiled):
        print("exception:", line)
    if arguments.out:
        numbers = [{**asdict(c), "shape": {**asdict(c.shape), "flags": sorted(c.shape.flags)}} for c in compiled]
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"triton": triton.__version__, "compiled": numbers}, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(markdown(compiled, note))


if __name__ == "__main__":
    main()
