import pytest


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(few_optimizations):
    """In all modules here."""
