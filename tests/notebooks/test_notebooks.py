"""The notebooks: each runs from top to bottom, and what is committed has its outputs and no trace of a machine."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "notebooks" / "execute.py"


def _module() -> ModuleType:
    """``notebooks/execute.py``, which lies in no package."""
    spec = importlib.util.spec_from_file_location("execute_notebooks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


execute = _module()
NOTEBOOKS = execute.find()
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own: the notebook machinery and its warnings stay out of this one."""
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


def code(source: str, count: int | None = 1, outputs: Any = (), **metadata: Any) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "execution_count": count,
        "id": f"cell-{abs(hash(source))}",
        "metadata": metadata,
        "outputs": list(outputs),
        "source": source,
    }


def stream(text: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": text}


def notebook(*cells: dict[str, Any], **metadata: Any) -> str:
    whole = {"kernelspec": execute.KERNELSPEC, "language_info": {"name": "python"}, **metadata}
    return json.dumps({"cells": list(cells), "metadata": whole, "nbformat": 4, "nbformat_minor": 5})


def test_there_are_notebooks() -> None:
    assert "01_first_vae" in [path.stem for path in NOTEBOOKS]


@pytest.mark.slow
@each_notebook
def test_runs_with_its_smallest_settings(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    result = run("--smoke", path.stem, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert path.stem in result.stdout
    assert not result.stderr
    assert path.read_bytes() == before
    assert not list(tmp_path.iterdir())


@each_notebook
def test_is_fit_to_be_committed(path: Path) -> None:
    assert execute.problems(path.read_text(encoding="utf-8")) == []


@each_notebook
def test_says_which_kernel_only(path: Path) -> None:
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
    assert set(metadata) == {"kernelspec", "language_info"}
    assert metadata["language_info"] == {"name": "python"}


@each_notebook
def test_shows_figures(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    plotting = [cell for cell in cells if cell["cell_type"] == "code" and "plt.show()" in "".join(cell["source"])]
    assert plotting
    for cell in plotting:
        assert any("image/png" in output.get("data", {}) for output in cell["outputs"]), cell["id"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (notebook(code("x = 1", count=2)), "not executed once each"),
        (notebook(code("x = 1", count=None)), "not executed once each"),
        (notebook(code("x = 1"), code("y = 1", count=1)), "not executed once each"),
        (notebook(code("print(1)")), "has no output"),
        (notebook(code("def f():\n    pass\nprint(f())")), "has no output"),
        (notebook(code("for x in (1, 2):\n    print(x)")), "has no output"),
        (
            notebook(code("f()", outputs=[{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}])),
            "failed",
        ),
        (notebook(code("f()", outputs=[stream("saved in /home/ada/runs")])), "an absolute path: saved in /home/ada"),
        (notebook(code("f()", outputs=[stream("/tmp/x.py:3: note")])), "an absolute path"),
        (notebook(code("f()", outputs=[stream(r"in C:\Users\ada")])), "an absolute path"),
        (notebook(code("f()", outputs=[stream("UserWarning: look out")])), "a warning"),
        (notebook(code("f()", outputs=[stream("Traceback (most recent call last)")])), "a traceback"),
        (notebook(code("f()", outputs=[stream(" 45%|####     | 9/20")])), "a progress bar"),
        (
            notebook(
                code("f", outputs=[{"output_type": "execute_result", "data": {"text/plain": "<f at 0x7f00aa11>"}}])
            ),
            "a memory address",
        ),
        (notebook(code("x = 1", execution={"iopub.busy": "now"})), "has metadata: execution"),
        (notebook(code("x = 1"), language_info={"name": "python", "version": "3.11.2"}), "metadata are not those"),
        (notebook(code("x = 1", outputs=[stream("x" * 1_000_000)])), "must stay below"),
        (notebook(code("x = 1") | {"id": None}), "ids"),
    ],
)
def test_finds_what_is_unfit(text: str, problem: str) -> None:
    assert any(problem in found for found in execute.problems(text)), execute.problems(text)


@pytest.mark.parametrize(
    "text",
    [
        notebook(code("print(1)", outputs=[stream("1")])),
        notebook(code("def f():\n    print(1)\n    return 2")),
        notebook(code("f()", outputs=[stream("see https://example.org/home/x, a/work/b and 50% | 3 nats/tmp/s")])),
        notebook(code("x = 1", tags=["hide"])),
    ],
)
def test_lets_pass_what_is_fit(text: str) -> None:
    assert execute.problems(text) == []


def test_writes_outputs_and_nothing_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "small.ipynb"
    source = "import os\nprint(os.environ.get('PYROVAE_SMOKE'), os.environ.get('MPLBACKEND', '').split('.')[-1])"
    path.write_text(notebook(code(source, count=None), code("1 + 1", count=None), language_info={"version": "2.7"}))
    result = run(path)
    assert result.returncode == 0, result.stderr
    text = path.read_text(encoding="utf-8")
    assert execute.problems(text) == []
    first, second = json.loads(text)["cells"]
    assert "".join(first["outputs"][0]["text"]).startswith("None ")  # full settings, …
    assert "Agg" not in "".join(first["outputs"][0]["text"])  # … and inline figures, whatever the backend here
    assert second["outputs"][0]["data"]["text/plain"] == ["2"]
    assert [file.name for file in tmp_path.iterdir()] == ["small.ipynb"]
    assert run("--check", path).returncode == 0


def test_smoke_is_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "small.ipynb"
    path.write_text(notebook(code("import os\nassert os.environ['PYROVAE_SMOKE'] == '1'", count=None)))
    assert run("--smoke", path).returncode == 0


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\nprint(x / 0)", "ZeroDivisionError"),
        ("import warnings\nwarnings.warn('mind the gap')", "UserWarning: mind the gap"),
    ],
)
def test_leaves_a_notebook_that_fails_as_it_was(source: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.ipynb"
    path.write_text(notebook(code(source, count=None)))
    before = path.read_bytes()
    result = run(path)
    assert result.returncode == 1
    assert said in result.stderr
    assert "code cell 1" in result.stderr or source in result.stderr
    assert path.read_bytes() == before


def test_check_executes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "small.ipynb"
    path.write_text(notebook(code("open('touched', 'w')", count=None)))
    result = run("--check", path)
    assert result.returncode == 1
    assert "not executed" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["small.ipynb"]


@pytest.mark.parametrize("name", ["99_nothing", "01_first", "nowhere/x.ipynb"])
def test_unknown_names_are_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        execute.main([name])
    said = capsys.readouterr().err
    assert name in said
    assert "01_first_vae" in said


def test_names_and_file_names_and_paths_are_found() -> None:
    first = NOTEBOOKS[0]
    assert execute.find([first.stem, first.name, str(first)]) == [first, first, first]


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        execute.main(["--help"])
    said = capsys.readouterr().out
    assert all(option in said for option in ("--smoke", "--check", "NAME"))


def test_a_write_that_fails_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.ipynb"
    path.write_text("old")

    def refuse(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(execute.os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        execute.write(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["small.ipynb"]
