"""What a compiled kernel's loops execute: SASS read as basic blocks, loops and the paths through one turn of them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\*", re.M)
_BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)\s*$")
CLASSES = {
    "global_loads": r"LDG|LDGSTS|LD\b",
    "global_stores": r"STG|ST\b",
    "mma": r"[A-Z]*MMA",
    "shuffles": r"SHFL",
    "barriers": r"BAR",
}


@dataclass(frozen=True)
class Turn:
    """One path through a loop's body, from its head back to it."""

    instructions: int
    counts: dict[str, int]


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its distinct turns, shortest first, and how many instructions its body has in all."""

    turns: tuple[Turn, ...]
    size: int


@dataclass(frozen=True)
class Code:
    instructions: int
    loops: tuple[Loop, ...]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Of the largest innermost loop: the one over keys, or over logits. () without a loop."""
        return max(self.loops, key=lambda loop: loop.size).turns if self.loops else ()


def tool(name: str) -> str:
    """A tool of CUDA's that comes with triton."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run_on(cubin: bytes, *command: str) -> str:
    handle, path = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        return subprocess.run([*command, path], capture_output=True, text=True, check=True).stdout
    finally:
        Path(path).unlink()


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread takes, and bytes a thread spills."""
    usage = _run_on(cubin, tool("cuobjdump"), "--dump-resource-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def disassemble(cubin: bytes) -> Code:
    return parse(_run_on(cubin, tool("cuobjdump"), "-sass"))


def parse(text: str) -> Code:
    """The loops of a listing by cuobjdump. A predicated instruction counts whether or not its predicate holds."""
    lines = [(int(address, 16), instruction) for address, instruction in _LINE.findall(text)]
    index = {address: i for i, (address, _) in enumerate(lines)}
    target: dict[int, int] = {}
    for i, (_, instruction) in enumerate(lines):
        branch = _BRANCH.search(instruction)
        if branch:
            target[i] = index[int(branch.group(1), 16)]
    leaders = sorted(
        {0, *target.values(), *(i + 1 for i in target), *(i + 1 for i, (_, x) in enumerate(lines) if "EXIT" in x)}
    )
    leaders = [i for i in leaders if i < len(lines)]
    blocks = {start: range(start, end) for start, end in zip(leaders, [*leaders[1:], len(lines)])}

    def successors(start: int) -> list[int]:
        last = blocks[start][-1]
        instruction = lines[last][1]
        conditional = instruction.startswith("@") or " UP" in instruction or "!UP" in instruction
        next_blocks = [target[last]] if last in target else []
        if (last not in target and not re.match(r"EXIT", instruction)) or conditional:
            next_blocks.append(last + 1)
        return [s for s in next_blocks if s in blocks]

    following = {start: successors(start) for start in blocks}
    reached, front = {0}, [0]
    while front:
        for s in following[front.pop()]:
            if s not in reached:
                reached.add(s)
                front.append(s)
    bodies: dict[int, set[int]] = {}
    for latch in reached:
        for head in following[latch]:
            if head <= latch:
                bodies[head] = {b for b in reached if head <= b <= max(latch, max(bodies.get(head, {head})))}
    # a few instructions that load nothing wait for something: part of the loop around them
    bodies = {head: body for head, body in bodies.items() if sum(len(blocks[b]) for b in body) > 8}
    inner = [head for head in bodies if not any(other != head and other in bodies[head] for other in bodies)]
    loops = []
    for head in sorted(inner):
        body = bodies[head]
        costs = {b: (len(blocks[b]), *_counts([lines[i][1] for i in blocks[b]])) for b in body}
        turns = [Turn(n, dict(zip(CLASSES, counts))) for n, *counts in sorted(_turns(head, following, costs))]
        if turns:
            loops.append(Loop(tuple(turns), sum(len(blocks[b]) for b in body)))
    return Code(len(lines), tuple(loops))


def _turns(head: int, following: dict[int, list[int]], costs: dict[int, tuple[int, ...]]) -> set[tuple[int, ...]]:
    """The distinct costs of the paths from a loop's head back to it; costs: of each block of its body."""
    to_head: dict[int, set[tuple[int, ...]]] = {}
    for block in sorted(costs, reverse=True):
        to_head[block] = set()
        for s in following[block]:
            rest = {(0,) * len(costs[block])} if s == head else to_head.get(s, set()) if s > block else set()
            to_head[block] |= {tuple(a + b for a, b in zip(costs[block], r)) for r in rest}
    return to_head[head]


def _counts(instructions: list[str]) -> list[int]:
    names = Counter(re.sub(r"^@!?U?P\w+\s+", "", x).split(".")[0].split(" ")[0] for x in instructions)
    return [sum(n for name, n in names.items() if re.fullmatch(pattern, name)) for pattern in CLASSES.values()]
