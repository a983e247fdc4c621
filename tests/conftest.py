"""Shared by all tests: where the demonstration model and the original's data are."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# As headrift sets it itself, but before any test imports torch (see vllm_engine).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

ROOT = Path(__file__).resolve().parents[1]


# What takes longest, the longest first. Of the rest no file takes more than some ten seconds.
LONGEST = (
    "kernels/test_triton_interpreted.py",
    "engine/test_interpreted.py",
    "engine/test_demo_model.py",
    "safety_heads/test_sahara.py",
    "corpus/test_throughput.py",
    "corpus/test_supervisor.py",
    "corpus/test_fault_injection.py",
    "docs/test_site.py",
    "engine/test_plugin.py",
    "engine/test_compilations.py",
    "cli/test_score.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that test processes end at about the same time.

    When several run at once (`make test`; pytest-xdist's loadfile), one has all tests of a file, in turn: for their
    fixtures' sake, and because a process has one engine at a time, so a file closes those that it starts.
    """
    places = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(ROOT / "tests").as_posix(), len(places)))


@pytest.fixture(scope="session")
def assert_within_units() -> Callable[..., None]:
    """Asserts that two tensors differ by at most `units` of their type's precision, relative to the largest number.

    For sums of products in another order: what they are off by is a multiple of eps times the terms, whatever is left
    of their sum. How often they round depends on the processor's vectors, so a bound on what is left would be fitted to
    one processor.
    """

    def check(result, expected, units: float) -> None:
        import torch

        atol = units * torch.finfo(result.dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(result, expected, rtol=0, atol=atol)

    return check


@pytest.fixture(scope="session")
def demo_model() -> Path:
    folder = ROOT / "models" / "smollm2-135m-instruct"
    if not (folder / "model.safetensors").exists():
        pytest.fail(f"the demonstration model is not in {folder}: run `make setup`, or `headrift demo-model {folder}`")
    return folder


@pytest.fixture(scope="session")
def tokenizer(demo_model):
    """The demonstration model's tokenizer."""
    from headrift.prepare import load_tokenizer

    return load_tokenizer(str(demo_model), False)


@pytest.fixture(scope="session")
def random_models(tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny random models of three architectures, by name: 3 layers, 211 tokens, no tokenizer."""
    from helpers.tiny_models import make_tiny_model

    return {name: make_tiny_model(name, tmp_path_factory.mktemp(name)) for name in ("llama-3to1", "qwen3", "gemma3")}


@pytest.fixture(scope="session")
def made() -> ModuleType:
    """What tests make runs with known truth with."""
    from helpers import made_runs

    return made_runs


@pytest.fixture(scope="session")
def make_chat_model(tmp_path_factory, demo_model) -> Callable[..., Path]:
    """Makes a random model with the demonstration model's tokenizer and chat template, see helpers.tiny_models."""

    def make(**options: object) -> Path:
        from helpers import tiny_models

        return tiny_models.make_chat_model(tmp_path_factory.mktemp("chat_model"), demo_model, **options)

    return make


@pytest.fixture(scope="session")
def tiny_model(make_chat_model) -> Path:
    """Two random layers with the demonstration model's tokenizer and chat template."""
    return make_chat_model()


@pytest.fixture(scope="session")
def seed_data() -> Path:
    """The original's prompts, which are not part of this repository: tests that need them are skipped without."""
    folder = ROOT.parent / "shared" / "seed_data"
    if not folder.exists():
        pytest.skip("the original's prompts are not beside this repository")
    return folder
