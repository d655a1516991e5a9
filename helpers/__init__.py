"""The helpers of the course: recipes, engines, generation and what is inside.

Names are resolved when first used, so `import helpers` loads neither torch nor a compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helpers.engine import build, inspect, load
    from helpers.errors import CourseError
    from helpers.model.sampling import SamplingParams
    from helpers.recipe import BuildRecipe

__version__ = "0.1.0"

_HOME = {
    "BuildRecipe": "recipe",
    "CourseError": "errors",
    "SamplingParams": "model.sampling",
    "build": "engine",
    "inspect": "engine",
    "load": "engine",
}
__all__ = ["BuildRecipe", "CourseError", "SamplingParams", "build", "inspect", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
