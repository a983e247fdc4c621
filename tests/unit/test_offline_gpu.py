"""scripts/offline_gpu: slimming a CUDA library, and installing a small bundle that is built as the large one is."""

import lzma
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from helpers.scripts import load

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "scripts/offline_gpu"


slim_cuda_library = load("scripts/offline_gpu/slim_cuda_library")
build = load("scripts/offline_gpu/build")
PTX, CODE = slim_cuda_library.PTX, slim_cuda_library.MACHINE_CODE


def entry(kind, sm, payload):
    """An entry of a container: a header of 64 bytes and the image."""
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(payload)).ljust(28, b"\0") + struct.pack("<I", sm)
    return header.ljust(64, b"\0") + payload


def container(*entries):
    return struct.pack("<IHHQ", slim_cuda_library.CONTAINER_MAGIC, 1, 16, len(b"".join(entries))) + b"".join(entries)


def library(*containers):
    """A 64-bit ELF file with the sections .nv_fatbin and .shstrtab."""
    code, names = b"\0" * 8 + b"".join(containers), b"\0.nv_fatbin\0.shstrtab\0"
    body = 64 + len(code) + len(names)
    sections = [(0, 0, 0, 0), (1, 1, 64, len(code)), (12, 3, 64 + len(code), len(names))]
    headers = b"".join(
        struct.pack("<IIQQQQIIQQ", n, kind, 0, 0, at, size, 0, 0, 1, 0) for n, kind, at, size in sections
    )
    elf = bytearray(b"\x7fELF\x02".ljust(64, b"\0"))
    struct.pack_into("<Q", elf, 0x28, body)
    struct.pack_into("<HHH", elf, 0x3A, 64, len(sections), 2)
    return elf + code + names + headers


def images(data):
    """Capability and kind of the entries of each container."""
    ((offset, size),) = ((at, n) for name, at, n in slim_cuda_library.sections(data) if name == ".nv_fatbin")
    result = slim_cuda_library.containers(data, offset, size)
    return [[(e.sm, e.kind) for e in entries] for _, _, entries in result]


def test_what_is_kept_of_each_container():
    data = library(
        container(
            entry(CODE, 80, b"a" * 40), entry(CODE, 90, b"b" * 80), entry(CODE, 90, b"c" * 8), entry(PTX, 90, b"d" * 8)
        ),
        container(entry(CODE, 80, b"e" * 16), entry(PTX, 75, b"f" * 24), entry(PTX, 80, b"g" * 8)),
        container(entry(CODE, 100, b"h" * 32), entry(CODE, 120, b"i" * 16)),
    )
    size = len(data)
    before, after = slim_cuda_library.slim(data, 90)
    assert images(data) == [[(90, CODE), (90, CODE)], [(80, PTX)], [(120, CODE)]]
    assert len(data) == size, "containers stay where they are"
    assert after < before
    for kept, dropped in ((b"b" * 80, b"a" * 40), (b"g" * 8, b"f" * 24), (b"i" * 16, b"h" * 32)):
        assert kept in data
        assert dropped not in data


def test_another_kind_of_file_is_refused():
    with pytest.raises(ValueError, match="not a 64-bit ELF file"):
        slim_cuda_library.slim(bytearray(b"MZ" * 100), 90)


@pytest.fixture
def bundle(tmp_path):
    """A bundle of one module and one library, in pieces of a kilobyte."""
    site, packed, out = (tmp_path / name for name in ("site", "packed", "bundle"))
    for folder in (site / "module", packed, out):
        folder.mkdir(parents=True)
    (site / "module/__init__.py").write_text(f"x = {os.urandom(1500).hex()!r}\n")
    with tarfile.open(packed / "python.tar.xz", "w:xz") as archive:
        archive.add(site, ".", filter=build.without_owner)
    (packed / "module+lib+a.so.xz").write_bytes(lzma.compress(b"machine code"))
    with tarfile.open(tmp_path / "bundle.tar", "w") as archive:
        for path in sorted(packed.iterdir()):
            archive.add(path, path.name)
    assert len(build.write_pieces(tmp_path / "bundle.tar", out, 1000)) > 2
    shutil.copy(FOLDER / "install.sh", out)
    return out


def install(bundle, into):
    command = ["bash", str(bundle / "install.sh"), "--repo", str(ROOT), "--into", str(into), "--no-check"]
    return subprocess.run([*command, "--python", sys.executable], capture_output=True, text=True)


def test_a_bundle_installs_with_headrift_from_the_checkout(bundle, tmp_path):
    done = install(bundle, tmp_path / "into")
    assert done.returncode == 0, done.stderr
    program = (
        "import module, headrift, importlib.metadata as m, pathlib; print(module.__file__, headrift.__file__, "
        "[e.value for e in m.entry_points(group='vllm.general_plugins') if 'checkout' in str(e.dist.locate_file(''))], "
        "(pathlib.Path(module.__file__).parent / 'lib/a.so').read_text(), sep='|')"
    )
    shell = f'unset PYTHONPATH; source {tmp_path}/into/env.sh; {sys.executable} -c "{program}"'
    shown = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout.strip().split("|")
    assert shown == [
        f"{tmp_path}/into/site/module/__init__.py",
        str(ROOT / "engine/headrift/__init__.py"),
        "['headrift.vllm_plugin.plugin:register']",
        "machine code",
    ]


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_bundle_is_refused_and_nothing_installed(bundle, tmp_path, damage):
    piece = bundle / "piece-01"
    if damage == "missing":
        piece.unlink()
    else:
        piece.write_bytes(piece.read_bytes()[::-1])
    done = install(bundle, tmp_path / "into")
    assert done.returncode == 1
    assert "pieces are missing or damaged" in done.stderr
    assert not (tmp_path / "into").exists()
