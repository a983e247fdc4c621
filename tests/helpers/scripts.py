"""Import the scripts of bench/ and scripts/, whose folders are not on sys.path."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    """Import a script by its path in the repository, without `.py`."""
    folder = str((ROOT / path).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = Path(path).name
    # tests/kernels is a namespace package called `kernels` under pytest, and bench/kernels.py a script of that name.
    if getattr(sys.modules.get(name), "__file__", None) is None:
        sys.modules.pop(name, None)
    return importlib.import_module(name)
