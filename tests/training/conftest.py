"""These tests compile much and compute little: here XLA compiles quickly rather than well."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def few_optimizations():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
