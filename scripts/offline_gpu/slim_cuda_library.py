"""Remove the code for other GPU generations from a shared library, so that the library compresses to a fraction.

    python slim_cuda_library.py --sm 90 IN.so OUT.so

A CUDA library holds each kernel once per GPU generation, in containers in its section `.nv_fatbin`; the driver picks
the entry that fits the GPU. In each container this keeps the machine code for --sm. If there is none, it keeps the
newest older code of the same major version, otherwise the newest PTX that is not newer, otherwise the smallest entry,
so that the driver still reports that nothing fits. The rest becomes zeros: containers stay where they are, the file
keeps its size, and zeros compress to nothing. The result runs on GPUs of that generation only.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONTAINER_MAGIC = 0xBA55ED50
PTX, MACHINE_CODE = 1, 2
NO_BYTES_IN_FILE = 8  # SHT_NOBITS
SECTIONS = (".nv_fatbin", "__nv_relfatbin")


@dataclass(frozen=True)
class Entry:
    """One kernel image of a container. sm: compute capability, 90 for 9.0."""

    offset: int
    size: int
    kind: int
    sm: int


def sections(data: bytearray) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each section of a 64-bit ELF file that has bytes in the file."""
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    strings = headers[names][4]
    for name, kind, _, _, offset, length, *_ in headers:
        if kind != NO_BYTES_IN_FILE:
            yield data[strings + name : data.index(b"\0", strings + name)].decode(), offset, length


def containers(data: bytearray, offset: int, length: int) -> Iterator[tuple[int, int, list[Entry]]]:
    """Offset, header size and entries of each container of a section."""
    end = offset + length
    while offset + 16 <= end:
        magic, _, header, size = struct.unpack_from("<IHHQ", data, offset)
        if magic != CONTAINER_MAGIC:
            offset += 8  # padding
            continue
        entries, at = [], offset + header
        while at < offset + header + size:
            kind, _, own_header, payload = struct.unpack_from("<HHIQ", data, at)
            (sm,) = struct.unpack_from("<I", data, at + 28)
            entries.append(Entry(at, own_header + payload, kind, sm))
            at += own_header + payload
        yield offset, header, entries
        offset += header + size


def entries_for(entries: list[Entry], sm: int) -> list[Entry]:
    """The entries to keep for a compute capability. Several of one (sm_90 and sm_90a) are all kept."""
    code = [e.sm for e in entries if e.kind == MACHINE_CODE and e.sm // 10 == sm // 10 and e.sm <= sm]
    if code:
        return [e for e in entries if e.kind == MACHINE_CODE and e.sm == max(code)]
    ptx = [e.sm for e in entries if e.kind == PTX and e.sm <= sm]
    if ptx:
        return [e for e in entries if e.kind == PTX and e.sm == max(ptx)]
    return [min(entries, key=lambda e: e.size)] if entries else []


def slim(data: bytearray, sm: int) -> tuple[int, int]:
    """Slim a library in place; bytes of GPU code before and after."""
    before = after = 0
    for name, offset, length in list(sections(data)):
        if name not in SECTIONS:
            continue
        for start, header, entries in list(containers(data, offset, length)):
            kept = b"".join(bytes(data[e.offset : e.offset + e.size]) for e in entries_for(entries, sm))
            size = sum(e.size for e in entries)
            data[start + header : start + header + size] = kept + bytes(size - len(kept))
            struct.pack_into("<Q", data, start + 8, len(kept))
            before, after = before + size, after + len(kept)
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, default=90, help="compute capability of the GPU, 90 for 9.0")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    data = bytearray(args.source.read_bytes())
    before, after = slim(data, args.sm)
    args.target.write_bytes(data)
    args.target.chmod(args.source.stat().st_mode)
    print(f"{args.source.name}: GPU code {before / 1e6:.1f} MB, {after / 1e6:.1f} MB of it kept")


if __name__ == "__main__":
    main()
