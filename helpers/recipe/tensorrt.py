"""The settings of the TensorRT builder that a learner can try. All are given by name, to helpers.engine.build_module
or as a recipe's options.

    mark_outputs="all" or [names]     intermediates become outputs, so they must be written to memory: fusion is
                                      hindered (the block's 11 network layers become 5 instead of 2: it is still
                                      computed in two, which write more, and three copy constants to outputs)
    compute_capabilities=["8.6"]      targets; fp8 is refused for 8.6, and begins with 8.9
    profiles=[{"x": ((1, 256), (8, 256), (64, 256))}]   least, likely and greatest shape of an input that varies;
                                      one layer more, shape_call, works out the sizes when the engine runs
    optimization_level=0 .. 5         accepted; in TensorRT for RTX without a GPU it changed nothing that we saw
    weight_streaming=True             weights may stay in host memory while the engine runs, if the program that runs
                                      it sets a budget; layers and plan stay the same
    refit=True                        weights can be exchanged later, so none is folded into another
    strip_weights=True                the plan holds no weights; refitting brings them back. TensorRT for RTX compiles
                                      both kinds further on a GPU, so both need an NVIDIA driver to build
    version_compatible=True           TensorRT: runs with later versions; TensorRT for RTX lacks what it needs
    hardware_compatibility="ampere_plus"      TensorRT only; TensorRT for RTX refuses it, and the next
    timing_cache="name"               a file in the engines' folder: a kernel measured once is not measured again
    precision_flags=["FP16"]          TensorRT 10 only: weak typing. The graph keeps its types (fp32, say), and the
                                      builder may compute a layer in a flagged type where it finds that faster.
                                      Without it, and in TensorRT 11 and for RTX always, typing is strong: each layer
                                      computes in the graph's own type. Written against the interface, not run by us
    provider="tensorrt"               TensorRT itself, where it and a GPU are there; default "tensorrt_rtx"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helpers.errors import BuildError, RecipeError, shown
from helpers.recipe.fields import RecipeFields, not_allowed
from helpers.recipe.options import check_options, refuse_cpu

LIBRARY = "the TensorRT builder"
KINDS: dict[str, Any] = {
    "provider": ("tensorrt_rtx", "tensorrt"),
    "optimization_level": tuple(range(6)),
    "profiles": list,
    "compute_capabilities": list,
    "mark_outputs": (str, list),
    "refit": bool,
    "strip_weights": bool,
    "weight_streaming": bool,
    "version_compatible": bool,
    "hardware_compatibility": ("", "ampere_plus", "same_compute_capability"),
    "timing_cache": str,
    "precision_flags": list,
}
PRECISION_FLAGS = ("FP16", "BF16", "INT8", "FP8", "INT4")  # of TensorRT 10's BuilderFlag; 11 has none of them
# A language model settles these by itself: nothing would give its engine stripped weights back, or set a budget.
FOR_MODULES = ("profiles", "mark_outputs", "precision_flags", "strip_weights", "weight_streaming")
RTX_LACKS = {  # what, likely cause, fix
    "timing_cache": (
        "keeps no timing cache: it measures no kernels while it builds.",
        "TensorRT says: Timing cache operations are no-ops in TensorRT-RTX.",
        "Leave the option out, or use provider='tensorrt' on a machine with a GPU.",
    ),
    "hardware_compatibility": (
        "has no hardware compatibility level: its engines run on several GPUs anyway.",
        "TensorRT says: setHardwareCompatibilityLevel() is unsupported in TensorRT-RTX.",
        "Name the targets instead: compute_capabilities=['8.6', '8.9'].",
    ),
    "precision_flags": (
        "has no precision flags: its networks are strongly typed.",
        "Each layer computes in the type that the graph gives it, as in TensorRT 11.",
        "Set the type in the graph: precision='fp16'. Flags need provider='tensorrt' in version 10.",
    ),
}


@dataclass(frozen=True)
class Options:
    """The builder's settings; see the top of this file. Raises RecipeError for a wrong value."""

    provider: str = "tensorrt_rtx"
    optimization_level: int | None = None
    profiles: tuple[Mapping[str, Any], ...] | list[Mapping[str, Any]] = ()
    compute_capabilities: tuple[str, ...] | list[str] = ()
    mark_outputs: str | list[str] = ""
    refit: bool = False
    strip_weights: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatibility: str = ""
    timing_cache: str = ""
    precision_flags: tuple[str, ...] | list[str] = ()

    def __post_init__(self) -> None:
        for target in self.compute_capabilities:
            if not isinstance(target, str) or not re.fullmatch(r"\d{1,3}\.\d", target, re.ASCII):
                raise _wrong("compute_capabilities", target, "texts such as '8.6'")
        names = [] if self.mark_outputs in ("", "all") else self.mark_outputs
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise _wrong("mark_outputs", self.mark_outputs, "'all' or a list of tensor names")
        if not re.fullmatch(r"([\w-][\w.-]{0,99})?", self.timing_cache, re.ASCII):
            raise _wrong("timing_cache", self.timing_cache, "a plain file name: it lies in the engines' folder")
        for flag in self.precision_flags:
            if flag not in PRECISION_FLAGS:
                raise _wrong("precision_flags", flag, f"some of {', '.join(PRECISION_FLAGS)}")
        for profile in self.profiles:
            if not isinstance(profile, Mapping):
                raise _wrong("profiles", profile, "tables of an input's name and its three shapes")
            for name, shapes in profile.items():
                _check_profile(name, shapes)
        for name, (what, cause, fix) in RTX_LACKS.items():
            if self.provider == "tensorrt_rtx" and getattr(self, name):
                raise BuildError(f"TensorRT for RTX {what}", cause=cause, fix=fix)


def make_options(options: Mapping[str, Any]) -> Options:
    """Checked settings from plain values, as a recipe or a call gives them; None is the default."""
    options = {name: value for name, value in options.items() if value is not None}
    check_options(LIBRARY, options, KINDS)
    return Options(**options)


def check(recipe: RecipeFields) -> None:
    """RecipeError for what a recipe of a language model asks and TensorRT does not have."""
    refuse_cpu(recipe, "TensorRT")
    for name in FOR_MODULES:
        if name in recipe.options:
            raise RecipeError(
                f"Recipe option {name!r} is for single modules: a language model settles it itself.",
                fix="Leave it out, or use build_module.",
            )
    if "optimization_level" in recipe.options and recipe.optimization_level != RecipeFields.optimization_level:
        raise RecipeError(
            "The recipe contradicts itself: it has the field optimization_level, and the option of that name.",
            fix="Give one of them; the option goes to 5.",
        )
    from_recipe(recipe)


def from_recipe(recipe: RecipeFields) -> Options:
    """The builder's settings for a language model."""
    return make_options({"optimization_level": recipe.optimization_level, **recipe.options})


def _check_profile(name: Any, shapes: Any) -> None:
    try:
        ranges = [*zip(*map(tuple, shapes), strict=True)]  # of each axis: least, likely, greatest
        fits = all(type(size) is int for axis in ranges for size in axis)
        fits = fits and all(0 < least <= likely <= greatest < 2**31 for least, likely, greatest in ranges)
    except (TypeError, ValueError):
        fits = False
    if not fits or not isinstance(name, str):
        allowed = "three shapes, each size of one at least that of the one before"
        raise _wrong(f"profile of {shown(name)}", shapes, allowed)


def _wrong(name: str, value: Any, allowed: str) -> RecipeError:
    return not_allowed(f"Option {name} of {LIBRARY}", value, allowed)
