"""The notebooks of docs/notebooks run from end to end, and what is committed of them was made by their cells.

They run in quick mode, with a random model of six layers, and one after another in one Jupyter kernel: what they import
is imported once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
# By notebook: what its cells print, and the folders that it writes.
SHOWN = {
    "safety_heads": (
        ("among the first ten of", "angle (degrees)", "attack success, ablated", "rank correlation"),
        ("ships", "sahara", "evaluated", "scaled", "scored"),
    ),
    "instability": (("scored, of which", "less head agreement", "AUROC on the other prompts", "benign, held out"), ()),
    "model_internals": (
        (
            "check: neutral text",
            "largest relative",
            "Spearman across system",
            "95% interval",
            "less that as system",
        ),
        ("internals",),
    ),
}


def printed(outputs) -> str:
    """What cells print, on one line."""
    return " ".join("".join(output.text for output in outputs if output.output_type == "stream").split())


def test_every_notebook_is_looked_at():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_it_is_committed_with_the_outputs_of_a_run_and_no_machines_paths(name):
    text = (NOTEBOOKS / f"{name}.ipynb").read_text("utf-8")
    cells = [cell for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert [part for part in SHOWN[name][0] if part not in printed(outputs)] == []
    assert len(text) < 600_000


@pytest.fixture(scope="module")
def kernel(make_chat_model, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A kernel, and the folder that notebooks write into."""
    import transformers

    size = {"hidden_size": 288, "num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3}
    model, out = make_chat_model(**size, max_position_embeddings=2048), tmp_path_factory.mktemp("notebooks") / "out"
    # In a random model the first layers' heads matter most, and the score leaves these layers out.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    for layer in loaded.model.layers[:2]:
        layer.self_attn.o_proj.weight.data *= 0.01
    loaded.save_pretrained(model)
    manager = KernelManager(kernel_name="python3")
    settings = {"HEADRIFT_QUICK": "1", "HEADRIFT_MODEL": str(model), "HEADRIFT_OUT": str(out)}
    manager.start_kernel(env={**os.environ, **settings}, cwd=str(NOTEBOOKS))
    yield SimpleNamespace(manager=manager, out=out)
    manager.shutdown_kernel(now=True)


@pytest.mark.nightly
@pytest.mark.parametrize("name", SHOWN)
def test_it_runs(kernel, name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))  # nothing is left of the one before
    before = set(kernel.out.glob("*"))
    NotebookClient(notebook, km=kernel.manager, timeout=500).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    says, folders = SHOWN[name]
    assert [part for part in says if part not in printed(outputs)] == []
    assert {path.name for path in set(kernel.out.glob("*")) - before} == set(folders)
