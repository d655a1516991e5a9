"""Which tests can run on this machine. What cannot is skipped, and the report lists it with the reason."""

import importlib.util
from functools import cache

import pytest


@cache
def missing(marker: str) -> str:
    """Why tests with this marker cannot run here; empty if they can."""
    if marker == "gpu":
        import torch

        return "" if torch.cuda.is_available() else "needs an NVIDIA GPU (make test-gpu there)"
    if marker == "browser":
        return "" if importlib.util.find_spec("playwright") else "needs playwright: pip install -e '.[browser]'"
    if marker == "oldest":
        import torch

        return "" if torch.__version__.startswith("2.9.") else "needs the oldest versions: make test-oldest"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers():
        if reason := missing(marker.name):
            pytest.skip(reason)
