"""The notebook of docs/notebooks runs from end to end, and what is committed of it was made by its cells."""

import os
import re
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebooks" / "safety_heads.ipynb"


def read():
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_with_the_outputs_of_a_run_and_no_machines_paths():
    notebook = read()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    text = NOTEBOOK.read_text("utf-8")
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert len(text) < 600_000


def test_it_runs(demo_model, tmp_path):
    from nbclient import NotebookClient

    notebook = read()
    env = {
        **os.environ,
        "HEADRIFT_QUICK": "1",
        "HEADRIFT_MODEL": str(demo_model),
        "HEADRIFT_OUT": str(tmp_path / "out"),
    }
    client = NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute(env=env)
    shown = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "stream"
    )
    for part in ("among the first ten of", "angle (degrees)", "attack success, ablated", "rank correlation"):
        assert part in shown
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"ships", "sahara", "evaluated", "scaled", "scored"}
