"""Executes the notebooks of this folder and writes their outputs in place.

python notebooks/execute.py                     every notebook, with its full settings
python notebooks/execute.py 01_first_vae        one of them
python notebooks/execute.py --smoke             every notebook in a few seconds; nothing is written
python notebooks/execute.py --check             whether the files are fit to be committed; nothing is executed
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["KERNELSPEC", "LARGEST", "SMOKE", "execute", "find", "main", "problems", "text_of", "write"]

FOLDER = Path(__file__).resolve().parent

SMOKE = "PYROVAE_SMOKE"
"""Environment variable that is 1 where a notebook is to take its smallest settings."""

LARGEST = 1_000_000
"""Bytes that a notebook with its outputs may have."""

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}

CELL_SECONDS = 1800  # a cell that takes longer hangs

_UNTIDY = {
    # Not after another path character, so that a URL's or a formula's slash does not count.
    "an absolute path": re.compile(r"(?<![\w.~/])/(?:home|root|work|tmp|Users|usr|opt|var)/|\b[A-Za-z]:\\"),
    "a warning": re.compile(r"Warning\b"),
    "a traceback": re.compile(r"Traceback"),
    "a progress bar": re.compile(r"\d+%\|"),
    "a memory address": re.compile(r"\bat 0x[0-9a-fA-F]{6,}"),
}


def find(names: Sequence[str] = ()) -> list[Path]:
    """The notebooks of this folder, in order, or those that are named.

    Args:
        names: each the name of a notebook of this folder, with or without ``.ipynb``, or the path of any notebook.

    Returns:
        Their paths.

    Raises:
        FileNotFoundError: there is no notebook of that name.
    """
    here = sorted(FOLDER.glob("*.ipynb"))
    if not names:
        return here
    found = []
    for name in names:
        candidates = [path for path in here if name in (path.stem, path.name)] or [Path(name)]
        if candidates[0].suffix != ".ipynb" or not candidates[0].is_file():
            raise FileNotFoundError(
                f"no notebook {name!r}; give one of {', '.join(path.stem for path in here)},"
                " or the path of an .ipynb file"
            )
        found.append(candidates[0])
    return found


def execute(path: Path, smoke: bool = False) -> Any:
    """Runs a notebook in a kernel of its own, with this interpreter, in the notebook's folder.

    Args:
        path: the notebook; it is only read.
        smoke: whether to ask it for its smallest settings.

    Returns:
        An ``nbformat`` notebook with the outputs of this execution and nothing else that varies from one to the next.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message shows it with its traceback.
    """
    # Imported here: --check and --help need nothing but the standard library.
    import nbformat
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory() as folder:
        # No folder to look for kernels in leaves the one of this interpreter: a kernel that the user has installed
        # under the name python3 may belong to another.
        manager = AsyncKernelManager(
            kernel_name=KERNELSPEC["name"],
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            connection_file=os.path.join(folder, "kernel.json"),
        )
        if os.name == "posix":  # sockets in that folder, which only this user can read, and not on the network
            manager.transport, manager.ip = "ipc", os.path.join(folder, "kernel")
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.resolve().parent)}},
        )
        client.km = manager  # here, since a manager that is given at construction is not shut down at the end
        client.execute(env=_environment(smoke, folder))
    return _tidied(notebook)


# At the start of a kernel that is only to show that the notebook runs: steps are traced as ever, and torch runs the
# graph, since Inductor would take ten seconds for each.
_WITHOUT_INDUCTOR = """
from pyrovae.training import graph
graph._inductor = lambda made, *_: (made, None)
del graph
"""


def _environment(smoke: bool, profile: str) -> dict[str, str]:
    """This environment, less what would change the outputs: another backend, the user's IPython start-up files."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MPLBACKEND", SMOKE)}
    environment["IPYTHONDIR"] = profile
    if smoke:
        environment[SMOKE] = "1"
        startup = Path(profile) / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "00-smoke.py").write_text(_WITHOUT_INDUCTOR)
    return environment


def _tidied(notebook: Any) -> Any:
    """Leaves the metadata that are the same on every machine."""
    notebook.metadata = {"kernelspec": dict(KERNELSPEC), "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in ("tags",) if key in cell.metadata}
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output["metadata"] = {}
    return notebook


def text_of(notebook: Any) -> str:
    """An ``nbformat`` notebook as its file holds it."""
    import nbformat

    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


def write(path: Path, text: str) -> None:
    """Writes a file, all of it or nothing.

    Args:
        path: where to.
        text: what.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def problems(text: str) -> list[str]:
    """What makes a notebook unfit to be committed.

    Args:
        text: the notebook, as its file holds it.

    Returns:
        A sentence each; empty when it has its outputs, in order, and nothing of the machine it ran on.
    """
    notebook = json.loads(text)
    found = []
    size = len(text.encode())
    if size >= LARGEST:
        found.append(f"the file has {size:,} bytes; it must stay below {LARGEST:,} (smaller figures, or a lower dpi)")
    if notebook["metadata"] != {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}:
        found.append("its metadata are not those that execute.py writes")
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("its code cells were not executed once each, from top to bottom")
    for number, cell in enumerate(code, start=1):
        if set(cell["metadata"]) - {"tags"}:
            found.append(f"code cell {number} has metadata: {', '.join(cell['metadata'])}")
        if not cell["outputs"] and _speaks("".join(cell["source"])):
            found.append(f"code cell {number} prints or plots, but has no output")
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            found.append(f"code cell {number} failed")
        said = "\n".join(_texts(cell["outputs"]))
        for what, pattern in _UNTIDY.items():
            if match := pattern.search(said):
                line = said[said.rfind("\n", 0, match.start()) + 1 :].split("\n", 1)[0]
                found.append(f"code cell {number} shows {what}: {line.strip()[:200]}")
    ids = [cell.get("id") for cell in notebook["cells"]]
    if None in ids or len(set(ids)) != len(ids):
        found.append("its cells lack ids of their own")
    return found


def _speaks(source: str) -> bool:
    """Whether a cell itself prints or shows a figure; what it only defines may do so later."""
    lines = [line for line in source.splitlines() if not line.startswith(("%", "!"))]
    doing = [part for part in ast.parse("\n".join(lines)).body if not isinstance(part, ast.FunctionDef | ast.ClassDef)]
    calls = (node for part in doing for node in ast.walk(part) if isinstance(node, ast.Call))
    return any(ast.unparse(call.func) in ("print", "plt.show") for call in calls)


def _texts(outputs: list[dict[str, Any]]) -> Iterator[str]:
    """All that outputs say in words: streams, and every representation of data that is no picture."""
    for output in outputs:
        yield "".join(output.get("text", ()))
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/") or kind == "image/svg+xml":
                yield "".join(value)
            elif kind.endswith("json"):
                yield json.dumps(value)


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="execute.py",
        description="Executes the notebooks of this folder, each in its own kernel with this interpreter, and writes "
        "their outputs in place.",
        epilog="The exit status is 1 when a notebook fails or is not fit to be committed; its file is then left as it "
        "was. Unknown names give 2.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="notebooks, as 01_first_vae or as a path; default: all"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--smoke", action="store_true", help=f"smallest settings ({SMOKE}=1), a few seconds; writes nothing"
    )
    mode.add_argument(
        "--check",
        action="store_true",
        help="execute nothing, but say whether the files are fit to be committed: outputs in order, small, and without "
        "warnings or paths of a machine",
    )
    arguments = parser.parse_args(given)
    try:
        arguments.paths = find(arguments.names)
    except FileNotFoundError as error:
        parser.error(str(error))
    return arguments


def _run(path: Path, smoke: bool) -> bool:
    """Executes one notebook and says how it went; whether it went well."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    start = time.perf_counter()
    try:
        notebook = execute(path, smoke)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        print(f"{path.stem}: failed after {time.perf_counter() - start:.1f} s\n{error}", file=sys.stderr)
        return False
    print(f"{path.stem}: {time.perf_counter() - start:.1f} s", flush=True)
    if smoke:
        return True
    text = text_of(notebook)
    if not _fit(path, text):
        print(f"{path.stem}: left as it was", file=sys.stderr)
        return False
    write(path, text)
    return True


def _fit(path: Path, text: str) -> bool:
    """Whether a notebook may be committed; says why not."""
    found = problems(text)
    for problem in found:
        print(f"{path.stem}: {problem}", file=sys.stderr)
    return not found


def main(given: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        given: the arguments; ``None`` for those of the process.

    Returns:
        The exit status.
    """
    arguments = _arguments(given)
    good = [
        _fit(path, path.read_text(encoding="utf-8")) if arguments.check else _run(path, arguments.smoke)
        for path in arguments.paths
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
