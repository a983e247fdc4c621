"""What jobs with faulty engines need: a fake model, and processes that know the engines."""

import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from headrift.prepare import load_tokenizer
from headrift.testing import write_fake_model

FAULTS = Path(__file__).resolve().parent / "fault_injection"


@pytest.fixture(scope="module")
def faulty() -> Iterator[ModuleType]:
    """The module `faulty`, importable in this process and in those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAULTS))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(FAULTS), os.environ.get("PYTHONPATH")])))
        import faulty

        yield faulty
        sys.modules.pop("faulty", None)


@pytest.fixture(scope="module")
def fake_model(faulty: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fake model, with its tokenizer pickled for processes that are to start fast."""
    folder = write_fake_model(tmp_path_factory.mktemp("fake") / "model")
    (folder / faulty.TOKENIZER).write_bytes(pickle.dumps(load_tokenizer(str(folder))))
    return folder
