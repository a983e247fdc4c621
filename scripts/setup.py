"""Set headrift up in this folder: virtual environment, packages, demonstration model. `make setup` runs this.

Standard library only. What is done already is not done again: each finished part leaves a stamp in .venv that names
what it was made from, so that a changed lock file or pyproject.toml is noticed.
"""

import fcntl
import hashlib
import os
import platform
import re
import selectors
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLD = ROOT / ".venv.old"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
LOCKS = [ROOT / "requirements" / "cpu.lock", ROOT / "requirements" / "dev.lock"]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST = (3, 11)
DISK_GB = 6


class SetupError(Exception):
    pass


def say(text):
    print(text, flush=True)


def digest(paths):
    h = hashlib.sha256()
    for path in paths:
        h.update(path.read_bytes())
    return h.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------------- stamps


def stamp(part, value):
    """A stamp's file. Its text is where the environment was made: one that was moved or copied does not work."""
    return VENV / f".headrift-{part}-{value}"


def is_stamped(path):
    try:
        return path.read_text(encoding="utf-8") == str(VENV)
    except OSError:
        return False


def write_stamp(part, path):
    for old in VENV.glob(f".headrift-{part}-*"):
        old.unlink()
    path.write_text(str(VENV), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- checks


def check_python():
    if sys.version_info < OLDEST:
        raise SetupError(
            f"headrift needs Python {OLDEST[0]}.{OLDEST[1]} or newer, and this is {platform.python_version()} "
            f"({sys.executable}). Name another one: make setup PYTHON=/path/to/python3.11"
        )


def check_machine():
    if sys.platform != "linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        raise SetupError(
            f"headrift's embedded engine, vLLM for CPUs, runs on x86-64 Linux. This is {platform.system()} on "
            f"{platform.machine()}."
        )
    name, version = platform.libc_ver()
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if name != "glibc" or numbers < (2, 28):
        library = f"{name} {version}".strip() or "another C library"
        raise SetupError(f"the packages need a Linux with glibc 2.28 or newer (from 2018 on). This one has {library}.")
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        flags = "avx2"
    if "avx2" not in flags:
        raise SetupError("vLLM for CPUs needs a processor with AVX2, which this one does not report.")


def check_disk():
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK_GB:
        raise SetupError(
            f"the set-up takes about {DISK_GB} GB of disk in {ROOT}, and {free:.1f} GB are free there. Make room, or "
            "put the checkout on a larger disk."
        )


# -------------------------------------------------------------------------------------------------------- running pip


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def run_with_progress(command, packages):
    """Run a pip command, its output in the log, a line of progress on the screen. Returns (exit status, output)."""
    live = sys.stdout.isatty()
    start = shown = time.monotonic()
    seen, phase, lines, rest = 0, "", [], b""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    try:
        with open(LOG, "ab") as log:
            log.write(("\n$ " + " ".join(map(str, command)) + "\n").encode())
            while True:
                if selector.select(timeout=1):
                    chunk = os.read(process.stdout.fileno(), 65536)
                    if not chunk:
                        break
                    log.write(chunk)
                    *whole, rest = (rest + chunk).split(b"\n")
                    for raw in whole:
                        line = raw.decode("utf-8", "replace").strip()
                        lines.append(line)
                        if line.startswith(("Collecting ", "Requirement already satisfied")):
                            seen += 1
                            phase = f"{min(seen, packages)} of {packages} packages found" if packages > 1 else ""
                        elif line.startswith("Downloading "):
                            name = line.split()[1].split("/")[-1]
                            phase = f"{min(seen, packages)} of {packages}: {name}" if packages > 1 else name
                        elif line.startswith("Building "):
                            phase = line
                        elif line.startswith("Installing collected packages"):
                            phase = "unpacking them" if packages > 1 else "unpacking it"
                now = time.monotonic()
                if live and now - shown >= 0.2:
                    width = shutil.get_terminal_size().columns - 1
                    print("\r\033[K" + f"      {clock(now - start)}  {phase}"[:width], end="", flush=True)
                    shown = now
                elif not live and now - shown >= 15:
                    say(f"      {clock(now - start)}  {phase}")
                    shown = now
            log.write(rest)
        status = process.wait()
    except BaseException:
        try:
            process.wait(timeout=10)  # an interrupt from the keyboard reached pip too, which then clears up
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        raise
    finally:
        if live:
            print("\r\033[K", end="", flush=True)
    return status, lines


def pip(*arguments, packages=1):
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps"]
    return run_with_progress([*command, "--progress-bar", "off", *map(str, arguments)], packages)


def tail(lines, count=12):
    dull = ("[notice]", "Looking in ", "WARNING: Retrying ", "Collecting ", "Requirement already satisfied")
    kept = [line for line in lines if line and not line.startswith(dull)][-count:]
    return "".join(f"\n    {line}" for line in kept or ["(nothing)"]) + f"\nThe whole output is in {LOG}."


# -------------------------------------------------------------------------------------------------------------- steps


def make_venv():
    shutil.rmtree(OLD, ignore_errors=True)
    if VENV.exists():
        ok = "import pip, sys; sys.exit(sys.version_info < %r or sys.prefix != %r)" % (OLDEST, str(VENV))
        works = PYTHON.exists() and not subprocess.run([str(PYTHON), "-c", ok], capture_output=True).returncode
        stamps = list(VENV.glob(".headrift-*"))
        if works and (not stamps or any(map(is_stamped, stamps))):
            return
        if not (VENV / "pyvenv.cfg").is_file() and any(VENV.iterdir()):
            raise SetupError(f"{VENV} is not a virtual environment. Move it away and try again.")
        say("      the old environment does not work any more (Python gone, too old, or moved): replaced")
        VENV.rename(OLD)  # first, so that an interrupted removal is not taken for somebody else's folder
        shutil.rmtree(OLD)
    check_disk()
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, errors="replace")
    if made.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        hint = ""
        if "ensurepip" in made.stdout + made.stderr:
            v = f"{sys.version_info[0]}.{sys.version_info[1]}"
            hint = f" Its venv module is incomplete; on Debian and Ubuntu: apt install python{v}-venv."
        raise SetupError(f"{sys.executable} could not make a virtual environment.{hint}\n{made.stdout}{made.stderr}")


def install_torch():
    """The CPU build: from where pip looks on this machine, else from PyTorch's own index."""
    pinned = re.search(r"^torch==\S+", LOCKS[0].read_text(encoding="utf-8"), re.MULTILINE)
    if pinned is None:
        raise SetupError(f"{LOCKS[0]} does not pin torch.")
    torch = pinned.group()
    status, first = pip(torch)
    if status == 0:
        return
    if not any("No matching distribution" in line or "Could not find a version" in line for line in first):
        raise SetupError(f"pip could not install {torch}. Its last words:{tail(first)}")
    say(f"      not where pip looks by default; now from {TORCH_INDEX} (about 200 MB)")
    status, second = pip(torch, "--index-url", TORCH_INDEX)
    if status:
        raise SetupError(
            f"{torch} could not be installed: it is not where pip looks on this machine (the usual index carries no "
            f"CPU builds), and {TORCH_INDEX} did not give it either. Is there a network, and may this machine reach "
            "that address? If you have the wheel, put it in a folder and set PIP_FIND_LINKS to that folder. "
            f"Pip's last words:{tail(second)}"
        )


def install_packages():
    names = set()
    for lock in LOCKS:
        names |= set(re.findall(r"^([A-Za-z0-9_.-]+)==", lock.read_text(encoding="utf-8"), re.MULTILINE))
    arguments = [x for lock in LOCKS for x in ("-r", lock)]
    status, lines = pip(*arguments, packages=len(names))
    if status:
        raise SetupError(
            f"pip could not install the packages. Is there a network? Its last words:{tail(lines)}\n"
            "Run the same command again to continue."
        )


def install_headrift():
    status, lines = pip("--no-build-isolation", "-e", ROOT)
    if status:
        raise SetupError(f"pip could not install headrift itself. Its last words:{tail(lines)}")


def make_model():
    made = subprocess.run([str(VENV / "bin" / "headrift"), "demo-model", str(MODEL)], cwd=ROOT)
    if made.returncode:
        raise SetupError("the demonstration model could not be made (see above). The rest of the set-up is done.")


def set_up():
    packages = stamp("packages", digest(LOCKS))
    package = stamp("headrift", digest([ROOT / "pyproject.toml", Path(__file__)]))
    todo = []
    if not is_stamped(packages) or not PYTHON.exists():
        todo += [
            (f"Virtual environment in {VENV.relative_to(ROOT)}, Python {platform.python_version()}", make_venv, None),
            ("PyTorch for CPUs", install_torch, None),
            ("vLLM for CPUs and the other packages: two to five minutes", install_packages, ("packages", packages)),
        ]
    if todo or not is_stamped(package):
        todo.append(("headrift, from this folder", install_headrift, ("headrift", package)))
    if not (MODEL / ".headrift-demo.json").is_file():
        todo.append((f"Demonstration model in {MODEL.relative_to(ROOT)}: a minute", make_model, None))
    if not todo:
        return
    start = time.monotonic()
    check_machine()
    for i, (what, step, stamped) in enumerate(todo, 1):
        say(f"[{i}/{len(todo)}] {what}")
        step()
        if stamped:
            write_stamp(*stamped)
    say(f"Set-up done in {clock(time.monotonic() - start)}.")


def main():
    os.environ.pop("VIRTUAL_ENV", None)
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ["PYTHONUNBUFFERED"] = "1"  # pip's output reaches the progress line as it is written
    os.environ.pop("PYTHONHOME", None)
    os.environ.pop("PYTHONPATH", None)
    try:
        check_python()
        with open(__file__, "rb") as lock:  # one set-up at a time
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("Another set-up is running in this folder; waiting for it.")
                fcntl.flock(lock, fcntl.LOCK_EX)
            set_up()
    except SetupError as error:
        print(f"\nSet-up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to continue.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
