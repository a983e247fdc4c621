"""Triton's interpreter has to be chosen before triton is imported, and spoils compiling for the rest of the process.

So these files run in processes of their own, which tests/kernels/test_triton_interpreted.py starts; any other pytest
process passes this folder by.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _mended_interpreter():
    from tools.traffic import mended

    with mended():
        yield
