"""Pack vLLM for a GPU machine without network. Run it on a machine where pip works; that needs no GPU.

    python scripts/offline_gpu/build.py [--out .bundle] [--sm 90] [--python 3.12] [--piece-mb 50]

The GPU machine must have PyTorch for CUDA, Triton, transformers and pytest; what vLLM needs beyond that is listed in
requirements.txt. vLLM's wheel of 327 MB is slimmed: code for one GPU generation only (slim_cuda_library.py), without
what serves quantised, MoE and MLA models and other GPUs, and packed with xz. Its compiled code uses PyTorch's stable
ABI, so PyTorch may be older than the version that the wheel asks for.

--out gets piece-00, piece-01, ... (at most --piece-mb each), SHA256SUMS and install.sh. Downloads stay in --work, so a
second run takes a minute. Needs `strip` (binutils). docs/install.md says how to carry and use it.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import slim_cuda_library  # noqa: E402

PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in range(39, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
# Parts of vLLM's wheel that a dense model in bf16 or fp16 on one Hopper GPU does not import.
LEFT_OUT = (
    "vllm/vllm-rs",
    "vllm/_moe_C_stable_libtorch.abi3.so",
    "vllm/_deepselect_C.abi3.so",
    "vllm/_flashkda_C.abi3.so",
    "vllm/_flashmla*_C.abi3.so",
    "vllm/_qutlass_C.abi3.so",
    "vllm/third_party/deep_gemm/*",
    "vllm/third_party/fmha_sm100/*",
    "vllm/third_party/tml_fa4/*",
    "vllm/benchmarks/*",
    "vllm/entrypoints/serve/instrumentator/static/*",
    "*.jpg",
    "*.png",
)
MAIN_LIBRARY = "vllm/_C_stable_libtorch.abi3.so"
# FlashAttention 3 is for compute capability 9, version 2 for the others.
FLASH = "vllm/vllm_flash_attn/_vllm_fa{version}_C.abi3.so"


def pip_download(folder: Path, python: str, *what: str) -> None:
    """Download wheels for the GPU machine's Python."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command += ["--python-version", python, "--implementation", "cp"]
    for abi in (f"cp{python.replace('.', '')}", "abi3", "none"):
        command += ["--abi", abi]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *what], check=True)


def unpack_wheel(wheel: Path, site: Path, left_out: tuple[str, ...] = ()) -> None:
    """Unpack as pip does, without scripts: `*.data/purelib` and `*.data/platlib` go to the top."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename
            if member.is_dir() or any(fnmatch(name, pattern) for pattern in left_out):
                continue
            first, _, rest = name.partition("/")
            if first.endswith(".data"):
                kind, _, name = rest.partition("/")
                if kind not in ("purelib", "platlib"):
                    continue
            target = site / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)


def pack_library(library: Path, packed: Path, sm: int) -> None:
    """Slim and compress a compiled library, unless that was done before, and remove it."""
    if not packed.exists():
        subprocess.run(["strip", "--strip-unneeded", library], check=True)
        data = bytearray(library.read_bytes())
        before, after = slim_cuda_library.slim(data, sm)
        print(f"{library.name}: GPU code {before / 1e6:.1f} MB, {after / 1e6:.1f} MB of it kept", flush=True)
        temporary = packed.with_suffix(".part")
        with lzma.open(temporary, "wb", preset=9) as out:
            out.write(data)
        temporary.replace(packed)
    library.unlink()


def without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The same archive for the same files, whoever packs them."""
    if "__pycache__" in member.name:
        return None
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = "root"
    return member


def write_pieces(archive: Path, out: Path, size: int) -> list[Path]:
    """Cut a file into pieces with checksums beside them."""
    for old in out.glob("piece-*"):
        old.unlink()
    pieces = []
    with archive.open("rb") as source:
        while content := source.read(size):
            pieces.append(out / f"piece-{len(pieces):02}")
            pieces[-1].write_bytes(content)
    sums = [f"{hashlib.sha256(piece.read_bytes()).hexdigest()}  {piece.name}\n" for piece in pieces]
    (out / "SHA256SUMS").write_text("".join(sums))
    return pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".bundle")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build/offline_gpu", help="downloads and intermediate files"
    )
    parser.add_argument("--sm", type=int, default=90, help="compute capability of the GPU, 90 for 9.0 (Hopper)")
    parser.add_argument("--python", default="3.12", help="the GPU machine's version")
    parser.add_argument("--vllm", default="0.32.0", help="version")
    parser.add_argument("--piece-mb", type=int, default=50, help="largest piece, in megabytes")
    args = parser.parse_args()
    work = args.work
    args.out.mkdir(parents=True, exist_ok=True)
    wheels, dependencies, site = work / "vllm", work / f"dependencies-{args.python}", work / "site"
    shutil.rmtree(site, ignore_errors=True)
    for folder in (wheels, dependencies, site, work / "compiled"):
        folder.mkdir(parents=True, exist_ok=True)
    if not list(wheels.glob(f"vllm-{args.vllm}-*.whl")):
        pip_download(wheels, args.python, f"vllm=={args.vllm}")
    pip_download(dependencies, args.python, "-r", str(HERE / "requirements.txt"))

    flash, other_flash = (3, 2) if args.sm // 10 == 9 else (2, 3)
    libraries = (MAIN_LIBRARY, FLASH.format(version=flash))
    (wheel,) = wheels.glob(f"vllm-{args.vllm}-*.whl")
    unpack_wheel(wheel, site, (*LEFT_OUT, FLASH.format(version=other_flash)))
    # "/" becomes "+": install.sh puts each library back in its place.
    packed = {name: work / "compiled" / f"{args.sm}-{args.vllm}-{name.replace('/', '+')}.xz" for name in libraries}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: pack_library(site / name, packed[name], args.sm), libraries))
    for wheel in sorted(dependencies.glob("*.whl")):
        unpack_wheel(wheel, site)
    python = work / "python.tar.xz"
    with tarfile.open(python, "w:xz", preset=9) as archive:
        archive.add(site, ".", filter=without_owner)
    bundle = work / "bundle.tar"
    with tarfile.open(bundle, "w") as archive:
        archive.add(python, "python.tar.xz", filter=without_owner)
        for name, path in packed.items():
            archive.add(path, f"{name.replace('/', '+')}.xz", filter=without_owner)
    pieces = write_pieces(bundle, args.out, args.piece_mb * 1_000_000)
    shutil.copy(HERE / "install.sh", args.out)
    for path in (python, *packed.values(), *pieces):
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path.name}")


if __name__ == "__main__":
    main()
