"""A recipe says what to build. It is checked when it is made, so a wrong field never reaches a compiler."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from helpers.errors import RecipeError, shown, why_refused
from helpers.paths import named, read_toml, write_text
from helpers.recipe import options, tensorrt, tensorrt_llm
from helpers.recipe.fields import (
    BACKENDS,
    DEVICES,
    OPTIMIZATION_LEVELS,
    PRECISIONS,
    Fusion,
    RecipeFields,
    not_allowed,
    safe_name,
)

# In TensorRT-LLM, in 2024 (its pull request 2057).
RENAMED = {"max_output_len": "max_seq_len, which counts the prompt and the answer"}


@dataclass(frozen=True)
class BuildRecipe(RecipeFields):
    """What to build. Two recipes with equal fields on the same machine give the same engine.

    model               "stories" (bundled), a Hub id, a checkpoint folder, or "dummy:" before either of these
    backend             one of BACKENDS
    precision           of weights and arithmetic; with int8 and int4 only the weights are narrow: `aot` computes in
                        fp32 (CPU) or bf16 (GPU)
    max_batch_size      most sequences at a time
    max_input_len       longest prompt, in tokens
    max_seq_len         longest prompt plus answer, in tokens; it sizes the KV cache
    optimization_level  0 compiles fastest, 3 runs fastest; `aot` on a CPU does the same at 2 and 3
    fusion              what may be merged
    device              "cpu", "cuda", or "auto": cuda where there is one
    decode_batch_sizes  the batch sizes that get a decode graph of their own; empty: 1 and max_batch_size
    num_threads         CPU threads of the engine; 0: the build tries several and keeps the fastest (level 0: one)
    options             settings that only this backend has, in its own words; in a file, the section named after it

    Raises RecipeError with the field, the value and what is allowed.
    """

    def __post_init__(self) -> None:
        if isinstance(self.fusion, dict):
            object.__setattr__(self, "fusion", _from_fields(Fusion, self.fusion, "fusion."))
        if isinstance(self.decode_batch_sizes, list):
            object.__setattr__(self, "decode_batch_sizes", tuple(self.decode_batch_sizes))
        _check_types(self)
        # The recipe's own, and as a file gives them back: the caller may change his dict, and a tuple becomes a list.
        object.__setattr__(self, "options", json.loads(json.dumps(self.options)))
        _one_of("backend", self.backend, BACKENDS)
        _one_of("precision", self.precision, PRECISIONS[self.backend], f" for backend {self.backend!r}")
        _one_of("device", self.device, DEVICES)
        _one_of("optimization_level", self.optimization_level, OPTIMIZATION_LEVELS)
        if not self.model.strip() or self.model.strip() == "dummy:":
            raise _not_allowed("model", self.model, "a model's name, a Hub id or a folder")
        _in_range("max_batch_size", self.max_batch_size, 1, 1024)
        _in_range("max_input_len", self.max_input_len, 1, 1 << 20)
        _in_range("max_seq_len", self.max_seq_len, 3, 1 << 20)
        _in_range("num_threads", self.num_threads, 0, 1024)
        if self.max_seq_len <= self.max_input_len:
            raise _not_allowed(
                "max_seq_len",
                self.max_seq_len,
                f"more than max_input_len ({self.max_input_len}): it counts the prompt and the answer",
            )
        for size in self.decode_batch_sizes:
            if size < 1 or size > self.max_batch_size:
                raise _not_allowed("decode_batch_sizes", size, f"1 to max_batch_size ({self.max_batch_size})")
        _check_options(self)

    def replace(self, **changes: Any) -> BuildRecipe:
        """The same recipe with some fields changed; unknown fields raise RecipeError."""
        return from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        fields["decode_batch_sizes"] = list(self.decode_batch_sizes)
        return fields

    @property
    def short_name(self) -> str:
        """Readable part of the engine's folder name, for example stories-aot-int8-b4."""
        model = safe_name(self.model.removeprefix("dummy:").rstrip("/").rsplit("/", 1)[-1])
        dummy = "dummy-" if self.model.startswith("dummy:") else ""
        return f"{dummy}{model}-{self.backend}-{self.precision}-b{self.max_batch_size}"


def from_dict(fields: dict[str, Any]) -> BuildRecipe:
    """A recipe from plain values, as a TOML file or a manifest holds them. A section that is named after the backend
    holds its options."""
    if not isinstance(fields, dict):
        raise RecipeError(f"A recipe is made from names with values, not from {shown(fields)}.", fix="Give a dict.")
    sections = [name for name in fields if name in BACKENDS]
    for name in sections:
        if name != fields.get("backend", BuildRecipe.backend) or "options" in fields:
            raise RecipeError(
                f"Section [{name}] does not belong in this recipe.",
                cause=f"It holds options of backend {name!r}; the recipe names another one, or has options already.",
                fix="Leave one of the two out.",
            )
        fields = {**{k: v for k, v in fields.items() if k != name}, "options": fields[name]}
    return _from_fields(BuildRecipe, fields)


def read(path: str | Path) -> BuildRecipe:
    """A recipe from a TOML file, such as those under engines/recipes/."""
    if not isinstance(path, (str, Path)):
        raise RecipeError(f"A recipe is read from a file, not from {shown(path)}.", fix="Give the path of a TOML file.")
    path = named(path)
    try:
        fields = read_toml(path)
    except FileNotFoundError:
        raise RecipeError(
            f"There is no recipe file {path.name!r}.",
            cause="The name is misspelt, or the path starts from another folder.",
            fix=f"Recipes here: {', '.join(sorted(p.name for p in path.parent.glob('*.toml'))) or 'none'}.",
        ) from None
    except OSError as error:
        words = f"{path.name} cannot be read: {error.strerror}."
        raise RecipeError(words, cause=why_refused(error), fix="Mend that, or give another file.") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"{path.name} is not valid TOML: {error}.", fix="Compare it with a file in engines/recipes/."
        ) from error
    return from_dict(fields)


def write(recipe: BuildRecipe, path: str | Path) -> Path:
    """Write a recipe as TOML, whole or not at all; `read` gives back an equal one."""
    import tomli_w

    if not isinstance(recipe, BuildRecipe) or not isinstance(path, (str, Path)):
        raise RecipeError(f"Nothing is written: {shown(recipe)} to {shown(path)}.", fix="Give a recipe and a path.")
    fields = recipe.to_dict()
    fields[recipe.backend] = fields.pop("options")
    fields = {name: value for name, value in fields.items() if value != {}}
    path, text = named(path), tomli_w.dumps(fields)
    try:
        text.encode()
    except ValueError as error:  # a name that no text file can hold
        raise RecipeError(f"The recipe cannot be written: {error}.", fix="Name its model otherwise.") from error
    write_text(path, text)
    return path


def _check_options(recipe: BuildRecipe) -> None:
    """RecipeError for whatever this recipe asks of its backend and cannot get. Looks at no machine."""
    options.refuse_unused(recipe)
    if recipe.backend.startswith("tensorrt_llm"):
        tensorrt_llm.check(recipe)
    elif recipe.backend == "tensorrt":
        tensorrt.check(recipe)
    elif recipe.backend == "vllm":
        options.refuse_cpu(recipe, "vLLM")
        options.check_options("vLLM 0.25.1", recipe.options, options.VLLM)
    else:
        known = options.AOT if recipe.backend == "aot" else {}
        options.check_options(f"Backend {recipe.backend!r}", recipe.options, known)


def _is_plain(value: Any, depth: int = 9) -> bool:
    """True for what TOML and JSON can both hold. depth: so many tables and lists may lie in each other."""
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(key, str) and _is_plain(item, depth - 1) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


def _from_fields(kind: type, fields: dict[str, Any], prefix: str = "") -> Any:
    known = [f.name for f in dataclasses.fields(kind)]
    for name in fields:
        if name not in known:
            renamed = f"An old name: today it is {RENAMED[name]}." if name in RENAMED else ""
            raise RecipeError(
                f"A recipe has no field {shown(f'{prefix}{name}')}.",
                cause=renamed or "A misspelt name, or a setting that belongs under options.",
                fix=f"The fields are: {', '.join(prefix + k for k in known)}.",
            )
    return kind(**fields)


def _check_types(recipe: BuildRecipe) -> None:
    for name, kind in get_type_hints(BuildRecipe).items():
        value = getattr(recipe, name)
        plain = getattr(kind, "__origin__", kind)
        if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
            raise _not_allowed(name, value, f"a value of type {plain.__name__}")
    for name, switch in dataclasses.asdict(recipe.fusion).items():
        if not isinstance(switch, bool):
            raise _not_allowed(f"fusion.{name}", switch, "true or false")
    for name, option in recipe.options.items():
        if not isinstance(name, str) or not _is_plain(option):
            raise _not_allowed(f"options.{name}", option, "a text, number, true, false, or a list or table of these")
    for size in recipe.decode_batch_sizes:
        if not isinstance(size, int) or isinstance(size, bool):
            raise _not_allowed("decode_batch_sizes", size, "whole numbers")


def _one_of(name: str, value: Any, allowed: tuple, where: str = "") -> None:
    if value not in allowed:
        raise _not_allowed(name, value, f"one of {', '.join(map(str, allowed))}{where}")


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise _not_allowed(name, value, f"a whole number from {low} to {high}")


def _not_allowed(name: str, value: Any, allowed: str) -> RecipeError:
    return not_allowed(f"Recipe field {name}", value, allowed)
