"""What is installed when: requirements.txt is the base of pyproject.toml and its extras; the base alone imports all."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# With the module that alone imports one of them at once.
SIDE_PATHS = {"fast-data": None, "tfds": "hart_jax.data.tfds_images", "transformers": None}

IMPORTS = """
import importlib, pkgutil, sys
for name in ("imagecodecs", "tensorflow_datasets", "transformers"):
    sys.modules[name] = None
import hart_jax
for module in pkgutil.walk_packages(hart_jax.__path__, "hart_jax."):
    if module.name not in sys.argv[1:] and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def test_requirements_are_the_base_and_the_extras_of_side_paths():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    extras = [line for extra in SIDE_PATHS for line in PROJECT["optional-dependencies"][extra]]
    tests = [line for line in PROJECT["optional-dependencies"]["dev"] if re.match("pytest>", line)]
    listed = [line for line in lines if line and not line.startswith("#")]
    assert sorted(listed) == sorted(PROJECT["dependencies"] + extras + tests)


def test_every_module_imports_without_the_extras():
    excepted = [module for module in SIDE_PATHS.values() if module]
    subprocess.run([sys.executable, "-c", IMPORTS, *excepted], cwd=ROOT, check=True)
