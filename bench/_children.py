"""Child processes that take requests as lines of JSON, and are stopped in between: `Child` is the parent's end.

A child is a script of this folder that calls `serve`. Between its turns it is stopped by a signal, so that it takes
nothing from the others: an engine that only waits has a dozen threads of gloo that wake a hundred times a second.
Only the standard library is imported: a child must be able to do without headrift, and in another Python.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_SHOWN = 2000  # characters of a failed child's output
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Child:
    """A script of this folder in a process of its own. A context manager.

    Args:
        script: Its file name.
        environment: All of its variables (default: those of this process).
        python: The interpreter.
    """

    def __init__(
        self, script: str, *, environment: Mapping[str, str] | None = None, python: str | Path = sys.executable
    ):
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  until `close`
        self._name = script
        self._born = time.perf_counter()
        variables = dict(os.environ if environment is None else environment)
        paths = [str(HERE), variables.get("PYTHONPATH", "")]
        if str(python) != sys.executable:  # another Python has packages of its own
            paths.pop()
        environment = {**variables, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [str(python), str(HERE / script)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._output, text=True
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def seconds_since_start(self) -> float:
        """Seconds since this object was made, the start of the process included."""
        return time.perf_counter() - self._born

    def ask(self, function: str, **arguments: Any) -> dict[str, Any]:
        """Have the child call one of its functions, and wait for the answer.

        Raises:
            RuntimeError: If the function fails or the child ends; with the end of the child's output.
        """
        to_child, from_child = self._process.stdin, self._process.stdout
        assert to_child is not None
        assert from_child is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            to_child.write(json.dumps({"do": function, **arguments}) + "\n")
            to_child.flush()
            line = from_child.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._output.seek(0)
            raise RuntimeError(f"{self._name} ended during {function!r}: {self._output.read()[-_SHOWN:]}")
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            # An engine's own process names the cause here, and the child's traceback does not.
            self._output.seek(0)
            end = self._output.read()[-2 * _SHOWN :]
            raise RuntimeError(
                f"{self._name} failed in {function!r}: {answer['error'][-_SHOWN:]}\nIts output ends:\n{end}"
            )
        return answer

    def close(self) -> None:
        """End the child: it ends by itself at the end of its input."""
        self._process.send_signal(signal.SIGCONT)
        self._process.communicate()
        self._output.close()


def serve(answers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """The child's end: answer each line by the function that it names, until there are no more.

    What else the process prints goes to standard error. Each answer holds the peak memory so far. The process ends
    with its parent, however that ends: one that is stopped would not notice.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    to_parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = answers[arguments.pop("do")](**arguments)
            answer["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=to_parent, flush=True)


class Stopwatch:
    """Wall and CPU seconds (of all threads of this process) of a `with` block."""

    seconds = cpu_seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self._wall, time.process_time() - self._cpu
