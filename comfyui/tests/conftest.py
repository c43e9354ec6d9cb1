"""Where the host is: a checkout of ComfyUI, with --host, or else what `contract` has of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_CONTRACT = Path(__file__).parent / "contract"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--host", type=Path, help="a checkout of ComfyUI, in whose environment the tests run")


def pytest_configure(config: pytest.Config) -> None:
    host = config.getoption("--host")
    # Last, since the host has a package `tests` too.
    sys.path.append(str(_CONTRACT if host is None else host.resolve()))
    if host is not None:
        import comfy.options

        # The host reads its own arguments when its modules are imported.
        sys.argv = [sys.argv[0], "--cpu"]
        comfy.options.enable_args_parsing()


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest) -> Path:
    """The checkout; without one the test is skipped."""
    path = request.config.getoption("--host")
    if path is None:
        pytest.skip("needs a checkout of ComfyUI: pytest comfyui --host PATH")
    return path.resolve()


@pytest.fixture
def contract(request: pytest.FixtureRequest) -> None:
    """The host is what `contract` has of it."""
    if request.config.getoption("--host") is not None:
        pytest.skip("is about what stands for the host where there is none")
