"""Every notebook runs from top to bottom, at tiny size, and was committed with the outputs of its own code."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import nbformat
import pytest

from hart_jax.checkpoints.model_folder import read_sampling, write_model
from hart_jax.config import SampleConfig, TokenizerConfig
from hart_jax.text.minilm import import_minilm
from notebooks.execute import FOLDER, code_cells, code_digest, executed, names, read
from tests.quickly import ROOT
from tests.tiny import tiny_model
from tests.tiny_bert import write_published

SIZES = {
    "HART_NOTEBOOK_STEPS": "2",
    "HART_NOTEBOOK_BATCH_SIZE": "4",
    "HART_NOTEBOOK_IMAGES": "6",
    "HART_NOTEBOOK_PROMPTS": "2",
    "HART_NOTEBOOK_VALUES": "1",
}
LARGEST = 400_000
every_notebook = pytest.mark.parametrize("name", names())


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Small settings, and a model of 8 px to sample with."""
    folder: Path = tmp_path_factory.mktemp("model")
    import_minilm(write_published(folder / "published"), folder / "text_encoder")
    write_model(folder / "model", tiny_model(folder / "text_encoder", context_tokens=6, context_dim=24))
    return {"JAX_PLATFORMS": "cpu", **SIZES, "HART_NOTEBOOK_MODEL": str(folder / "model")}


def shown(cell: nbformat.NotebookNode) -> set[str]:
    """What kinds of outputs a cell has."""
    kinds: set[str] = set()
    for output in cell.outputs:
        kinds |= set(output.data) if "data" in output else {output.get("name", output.output_type)}
    return kinds


@pytest.mark.slow
@every_notebook
def test_runs_and_shows_what_the_committed_one_does(name, environment):
    committed = read(name)
    run = executed(committed, environment)
    assert [shown(cell) for cell in code_cells(run)] == [shown(cell) for cell in code_cells(committed)]


@every_notebook
def test_is_committed_with_its_outputs(name):
    notebook = read(name)
    again = f"run python notebooks/execute.py {name}"
    assert notebook.metadata.get("code_sha256") == code_digest(notebook), f"outputs are of other code: {again}"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), again
    assert any(kind.startswith("image/") for cell in cells for kind in shown(cell))
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST


def test_what_one_says_of_sample_py_is_so():
    notebook, own = read("generate"), read_sampling(ROOT / "assets" / "emoji", TokenizerConfig())
    (settings,) = re.findall(r"^settings = (SampleConfig\(.*\))$", code_cells(notebook)[1].source, re.MULTILINE)
    (said,) = [cell.source for cell in notebook.cells if "`sample.py`" in cell.source]
    cfg, own_cfg = re.search(r"`--cfg=([\d.]+)`.* guidance is ([\d.]+)\.", said).groups()
    assert float(own_cfg) == own.cfg
    assert eval(settings, {"SampleConfig": SampleConfig}) == dataclasses.replace(own, cfg=float(cfg))
