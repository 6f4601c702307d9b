"""Options of the whole suite; pytest reads them from here however the tests are named on the command line."""

import os
from collections.abc import Iterator

from tests.quickly import QUICKLY, xla_flags

# JAX reads both when it is imported.
os.environ |= QUICKLY | {"XLA_FLAGS": xla_flags()}

import hypothesis
import jax
import pytest
from absl import flags

# Tests assert no times: the first example of a property pays for compilation.
hypothesis.settings.register_profile("hart", deadline=None)
hypothesis.settings.load_profile("hart")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, those of whole trainings, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: not item.path.name.startswith("test_train_"))


@pytest.fixture(autouse=True)
def no_flags_are_left() -> Iterator[None]:
    """A test that parses flags in this process puts them back (`tests.in_process`); or the next has their values."""
    yield
    assert not any(flags.FLAGS[name].present for name in flags.FLAGS)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        help="golden cases for tests/parity: a folder of them, or one (default: the two there)",
    )


@pytest.fixture
def compile_well() -> Iterator[None]:
    """For numbers that are held against others' to the last bits: XLA optimises, as for users."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
