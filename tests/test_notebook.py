"""grpo_colab.ipynb, run from its first cell to its last in a kernel of this Python, on the tiny model."""

import ast
import asyncio
import copy
import json
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
NOTEBOOK = nbformat.read(ROOT / "grpo_colab.ipynb", as_version=4)
SHORT = "--max_steps 4 --prompts_per_step 2 --num_generations 4 --micro_batch_size 4 --eval_samples 20 --sample_steps 2"
SHORT += " --max_completion_length 24"


@pytest.fixture
def client(monkeypatch, tmp_path):
    """The notebook, ready to run on recipes/tiny.yaml: with these further settings, and without the cells named."""

    def make(extra=SHORT, without=()):
        for name, value in {
            "GRPO_CONFIG": "recipes/tiny.yaml",
            "GRPO_OUTPUT": str(tmp_path / "run"),
            "GRPO_EXTRA": extra,
            "GRPO_PYTHON": sys.executable,
            "IPYTHONDIR": str(tmp_path / "ipython"),
        }.items():
            monkeypatch.setenv(name, value)
        notebook = copy.deepcopy(NOTEBOOK)
        notebook.cells = [cell for cell in notebook.cells if cell.id not in without]
        # No folders of kernels: ipykernel's own stays, which is this Python.
        kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        return NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(ROOT)}})

    return make


def printed(notebook, cell_id):
    """What a cell shows as text."""
    outputs = next(cell.outputs for cell in notebook.cells if cell.id == cell_id)
    return "\n".join(
        output.text if output.output_type == "stream" else str(output.get("data", output.get("evalue", "")))
        for output in outputs
    )


def pictures(notebook, cell_id):
    outputs = next(cell.outputs for cell in notebook.cells if cell.id == cell_id)
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_as_stored():
    nbformat.validate(NOTEBOOK)
    assert (NOTEBOOK.nbformat, NOTEBOOK.nbformat_minor) == (4, 5)
    assert NOTEBOOK.metadata.kernelspec.name == "python3"
    for cell in NOTEBOOK.cells:
        if cell.cell_type != "code":
            continue
        assert not cell.outputs and cell.execution_count is None
        assert len(cell.source.splitlines()) <= 25
        assert imported(cell.source) <= sys.stdlib_module_names | {"IPython", "google", "support"}


def imported(source: str) -> set[str]:
    """The packages that `source` imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        found |= {name.split(".")[0] for name in names}
    return found


def test_colabs_own_python_can_import_what_the_cells_run():
    source = (ROOT / "support" / "notebook.py").read_text(encoding="utf-8")
    assert imported(source) <= sys.stdlib_module_names | {"IPython"}


def test_run_all_then_again(client, tmp_path):
    notebook = client().execute()
    assert "check passed" in printed(notebook, "check").splitlines()
    assert json.loads((tmp_path / "run" / "check.json").read_text())["passed"]
    training = printed(notebook, "train")
    assert "\nstep   2  reward " in training and "\nstep   4  reward " in training
    assert "    question: " in training
    assert "|█" not in training  # progress bars do not stay
    assert len(pictures(notebook, "train")) == 1
    assert len(pictures(notebook, "result")) == 1
    after = json.loads((tmp_path / "run" / "eval.json").read_text())["after"]
    result = printed(notebook, "result")
    assert "before | 20 |" in result and f"after | 20 | {after['strict']:.1%} |" in result
    assert "— answer" in printed(notebook, "before")
    assert "<th" in printed(notebook, "after") and "&lt;answer&gt;" in printed(notebook, "after")
    assert "\\x1b" not in printed(notebook, "after")  # colours of a terminal
    assert "adapter " in printed(notebook, "eval")
    assert json.loads((tmp_path / "run" / "eval_test.json").read_text())["n"] == 200

    # After a disconnect: a new kernel, the same folder.
    first = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = client(without=["before", "after", "eval"]).execute()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == first
    assert "before | 20 |" in printed(again, "result")


def test_a_failing_script_fails_its_cell(client):
    failing = client("--max_stepz 1", without=["check", "before"])
    with pytest.raises(CellExecutionError) as error:
        failing.execute()
    assert error.value.evalue.startswith("error: unknown setting --max_stepz; the nearest is --max_steps.")
    assert "Traceback" not in printed(failing.nb, "train")


def test_the_stop_button_saves_a_checkpoint(client, tmp_path):
    stopping = client(SHORT.replace("--max_steps 4", "--max_steps 10000"), without=["check", "before"])
    metrics = tmp_path / "run" / "metrics.jsonl"

    async def press_stop_in_step_2():
        running = asyncio.ensure_future(stopping.async_execute())
        while not running.done() and not (metrics.exists() and metrics.read_text()):
            await asyncio.sleep(0.2)
        await stopping.km.interrupt_kernel()
        await running

    with pytest.raises(CellExecutionError, match="run it again to go on"):
        asyncio.run(press_stop_in_step_2())
    assert "SIGINT: finishing this step" in printed(stopping.nb, "train")
    assert len(list((tmp_path / "run").glob("checkpoint-*/complete.json"))) == 1
