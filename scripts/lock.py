"""Resolve requirements/*.in into requirements/*.lock with pip-compile, in the project's environment: `make lock`.

Name files to resolve only those: `python scripts/lock.py cpu dev gpu`. Without names: cpu and dev.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "requirements"
BIN = Path(sys.executable).parent
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# No place of this machine's goes into a lock, and not the three packages that cpu.in explains.
OPTIONS = ["--strip-extras", "--annotation-style=line", "--no-emit-find-links", "--no-emit-index-url"]
OPTIONS += ["--no-emit-trusted-host", "--no-emit-options", "--quiet"]
LEFT_OUT = ["torchaudio", "torchcodec", "torchvision"]


def cpu_torch_options() -> list[str]:
    """Nothing if pip finds PyTorch's CPU build by itself, else PyTorch's own index."""
    pinned = re.search(r"^torch==([\w.]+)", (FOLDER / "cpu.in").read_text(encoding="utf-8"), re.MULTILINE)
    if pinned is None:
        sys.exit("requirements/cpu.in does not pin torch.")
    requirement = f"torch=={pinned.group(1)}+cpu"
    look = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "--quiet",
        requirement,
    ]
    has_build = subprocess.run(look, capture_output=True, check=False).returncode == 0
    return [] if has_build else ["--extra-index-url", TORCH_INDEX]


def main(names: list[str]) -> None:
    for name in names:
        command = [str(BIN / "pip-compile"), *OPTIONS, f"--output-file={name}.lock"]
        if name != "cpu":
            command += ["--allow-unsafe"]
        if name in ("cpu", "dev"):
            command += cpu_torch_options()
            command += [f"--unsafe-package={package}" for package in LEFT_OUT]
        print(f"requirements/{name}.in -> requirements/{name}.lock", flush=True)
        environment = {**os.environ, "CUSTOM_COMPILE_COMMAND": f"make lock   (scripts/lock.py {name})"}
        if subprocess.run([*command, f"{name}.in"], cwd=FOLDER, env=environment, check=False).returncode:
            sys.exit(f"pip-compile could not resolve requirements/{name}.in (see above).")
        cpu_build = "+cpu" in (FOLDER / f"{name}.lock").read_text(encoding="utf-8")
        if name == "cpu" and not cpu_build:
            sys.exit("requirements/cpu.lock has no CPU build of torch in it, and needs one.")
        if name == "gpu" and cpu_build:
            sys.exit(
                "requirements/gpu.lock has a CPU build of torch in it: pip finds one on this machine. Resolve it where "
                "pip does not, or without that setting (PIP_FIND_LINKS, PIP_CONFIG_FILE, PIP_EXTRA_INDEX_URL)."
            )


if __name__ == "__main__":
    main(sys.argv[1:] or ["cpu", "dev"])
