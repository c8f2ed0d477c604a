"""Imports run one way: rewards ← data, support ← train_grpo ← infer ← benchmarks; and no file is in a circle."""

import ast
import graphlib
import re
import shutil
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
RANKS = {"rewards": 0, "data": 1, "support": 1, "train_grpo": 2, "infer": 3, "benchmarks": 4}


def imports(root: Path) -> dict[str, set[str]]:
    """The modules of the project, by dotted name, and which of the others each imports: anywhere in it, also for types."""
    files = [file for name in RANKS for file in (root / f"{name}.py", *(root / name).glob("*.py")) if file.is_file()]
    modules = {".".join(file.relative_to(root).with_suffix("").parts): file for file in files}
    found = {}
    for module, file in modules.items():
        names = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module} has a relative import: give the module's whole name"
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        found[module] = {name for name in names if name in modules}
    return found


def check(root: Path) -> None:
    found = imports(root)
    for module, names in found.items():
        for name in names:
            ranks = [RANKS[dotted.split(".")[0]] for dotted in (name, module)]
            assert ranks[0] <= ranks[1], f"{module} imports {name}"
    assert list(graphlib.TopologicalSorter(found).static_order())  # raises CycleError


def test_imports_run_one_way():
    found = imports(ROOT)
    assert "support.settings" in found["train_grpo"] and "train_grpo" in found["infer"]
    check(ROOT)


@pytest.mark.parametrize(
    "file, line, error",
    [
        ("support/step_report.py", "def late():\n    from train_grpo import run", AssertionError),
        ("support/memory.py", "if TYPE_CHECKING:\n    import infer", AssertionError),
        ("rewards.py", "from data import to_prompt", AssertionError),
        ("support/settings.py", "from support import memory, step_report", graphlib.CycleError),
        ("support/errors.py", "import data", graphlib.CycleError),
    ],
)
def test_an_arrow_that_runs_back_is_found(tmp_path, file, line, error):
    for name in RANKS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / f"{name}.py", tmp_path)
    check(tmp_path)
    with (tmp_path / file).open("a") as text:
        text.write(f"\n{line}\n")
    with pytest.raises(error):
        check(tmp_path)


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_is_pinned_for_every_python_that_may_run_it(version):
    """pip skips a constraint whose marker does not hold, without a word."""
    python = {"python_version": version, "python_full_version": f"{version}.0"}
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line[:80]]
    pinned = [canonicalize_name(pin.name) for pin in pins if pin.marker is None or pin.marker.evaluate(python)]
    assert len(pinned) == len(set(pinned)) > 200
    for file in ("requirements.txt", "requirements-cpu.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if line[0] not in "#-":
                assert canonicalize_name(Requirement(line.partition("#")[0]).name) in pinned


def test_the_address_is_the_same_everywhere():
    """pyproject.toml has it; the badges and the notebook cannot read it there."""
    address = re.search(r'address = "https://github\.com/([^"]+)"', (ROOT / "pyproject.toml").read_text())[1]
    for file, times in {"README.md": 1, "README.zh-CN.md": 1, "grpo_colab.ipynb": 2}.items():
        found = re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+?)(?:/blob/main|\\?\")", (ROOT / file).read_text())
        assert found == [address] * times, f"{file} has {found}, and pyproject.toml {address}"


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_a_readme_is_short(readme):
    lines = (ROOT / readme).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180 and sum(len(line.split()) for line in lines) <= 1500
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


@pytest.mark.parametrize(
    "document",
    [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("[!.]*/*.md")) + sorted(ROOT.glob("*.md"))],
)
def test_links_between_documents_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"(?:\]\(|src=\")(?!https?:|#)([^)#\s\"]+)", text):
        assert ((ROOT / document).parent / target).exists(), f"{document} links to {target}"
