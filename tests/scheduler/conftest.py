"""Options of the scheduler's tests: `pytest tests/scheduler --rewrite-traces` writes the golden traces anew."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-traces", action="store_true", help="write tests/traces anew instead of comparing")


@pytest.fixture
def rewrite_traces(request: pytest.FixtureRequest) -> bool:
    # Absent when this folder is collected as part of a larger run: the option is then unknown.
    return bool(request.config.getoption("--rewrite-traces", default=False))
