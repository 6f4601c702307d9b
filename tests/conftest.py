"""Options of the whole suite; pytest reads them from here however the tests are named on the command line."""

import hypothesis
import pytest

# Tests assert no times: the first example of a property pays for compilation.
hypothesis.settings.register_profile("hart", deadline=None)
hypothesis.settings.load_profile("hart")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        help="golden cases for tests/parity: a folder of them, or one (default: the two there)",
    )
