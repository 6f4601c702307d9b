"""Runs the notebooks from top to bottom and keeps their outputs: `python notebooks/execute.py`, or with some names.

    python notebooks/execute.py generate attention

The settings of their first cells can be set by the environment, see there.
"""

import argparse
import copy
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_digest(notebook: nbformat.NotebookNode) -> str:
    """Of all code: a notebook's outputs are its own if they were kept with this digest."""
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()


def executed(notebook: nbformat.NotebookNode, environment: Mapping[str, str] | None = None) -> nbformat.NotebookNode:
    """A copy with the outputs of a new kernel, in which `environment` is set besides this process's; without stderr,
    which is progress and what libraries have to say.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = copy.deepcopy(notebook)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name=KERNEL["name"],
        record_timing=False,
        # It would warn, on each start, that messages to a kernel on this machine are not encrypted.
        extra_arguments=["--log-level=ERROR"],
        # One output for all that a cell prints, as it looks while it runs.
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    path = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    client.execute(env={**os.environ, "PYTHONPATH": path, **(environment or {})})
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    # Nothing of the machine, so that another run changes the outputs alone.
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "code_sha256": code_digest(notebook)})
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *names()], metavar="NAME", help=", ".join(names()))
    for name in parser.parse_args().names or names():
        nbformat.write(executed(read(name)), FOLDER / f"{name}.ipynb")
        print(f"{name}: executed", flush=True)


if __name__ == "__main__":
    main()
