"""A recipe says what to build. It is checked when it is made, so a wrong field never reaches a compiler."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from .errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BACKENDS = ("aot", "pytorch", "torch_compile", "tensorrt", "tensorrt_llm", "tensorrt_llm_pytorch", "vllm")
COMPILED = ("aot", "tensorrt", "tensorrt_llm")  # these leave an engine on disk; the others only hold a recipe
PRECISIONS = {  # what each backend can build; issue text and README table say the same
    "aot": ("fp32", "bf16", "fp16", "int8"),
    "pytorch": ("fp32", "bf16", "fp16"),
    "torch_compile": ("fp32", "bf16", "fp16"),
    "tensorrt": ("fp32", "bf16", "fp16", "int8", "int4", "fp8"),
    "tensorrt_llm": ("fp32", "bf16", "fp16", "int8", "int4", "fp8"),
    "tensorrt_llm_pytorch": ("bf16", "fp16"),
    "vllm": ("fp32", "bf16", "fp16", "fp8"),
}
DEVICES = ("auto", "cpu", "cuda")
OPTIMIZATION_LEVELS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Fusion:
    """What the builder may merge. All on is what to ship; switching one off shows what it was worth."""

    kernels: bool = True  # let the compiler put several operations into one kernel
    qkv: bool = True  # the query, key and value projections as one matrix product
    gate_up: bool = True  # the two input projections of the MLP as one matrix product


@dataclass(frozen=True)
class BuildRecipe:
    """What to build. Two recipes with equal fields on the same machine give the same engine.

    model               "stories" (bundled), a Hub id, a checkpoint folder, or "dummy:" before either of these
    backend             one of BACKENDS
    precision           of weights and arithmetic; int8 keeps weights as int8 and computes in fp32 (CPU) or bf16 (GPU)
    max_batch_size      most sequences at a time
    max_input_len       longest prompt, in tokens
    max_seq_len         longest prompt plus answer, in tokens; it sizes the KV cache
    optimization_level  0 compiles fastest, 3 runs fastest
    fusion              what may be merged
    device              "cpu", "cuda", or "auto": cuda where there is one
    batch_sizes         the batch sizes that get a decode graph of their own; empty: 1 and max_batch_size
    num_threads         CPU threads that the kernels are compiled for; 0: chosen from the weights' size
    options             settings that only this backend has, in its own words; in a file, the section named after it

    Raises RecipeError with the field, the value and what is allowed.
    """

    model: str = "stories"
    backend: str = "aot"
    precision: str = "fp32"
    max_batch_size: int = 1
    max_input_len: int = 128
    max_seq_len: int = 256
    optimization_level: int = 3
    fusion: Fusion = field(default_factory=Fusion)
    device: str = "auto"
    batch_sizes: tuple[int, ...] = ()
    num_threads: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.fusion, dict):
            object.__setattr__(self, "fusion", _from_fields(Fusion, self.fusion, "fusion."))
        if isinstance(self.batch_sizes, list):
            object.__setattr__(self, "batch_sizes", tuple(self.batch_sizes))
        _check_types(self)
        _one_of("backend", self.backend, BACKENDS)
        _one_of("precision", self.precision, PRECISIONS[self.backend], f" for backend {self.backend!r}")
        _one_of("device", self.device, DEVICES)
        _one_of("optimization_level", self.optimization_level, OPTIMIZATION_LEVELS)
        if not self.model.strip() or self.model.strip() == "dummy:":
            raise _wrong("model", self.model, "a model's name, a Hub id or a folder")
        _in_range("max_batch_size", self.max_batch_size, 1, 1024)
        _in_range("max_input_len", self.max_input_len, 1, 1 << 20)
        _in_range("max_seq_len", self.max_seq_len, 3, 1 << 20)
        _in_range("num_threads", self.num_threads, 0, 1024)
        if self.max_seq_len <= self.max_input_len:
            raise _wrong(
                "max_seq_len",
                self.max_seq_len,
                f"more than max_input_len ({self.max_input_len}): it counts the prompt and the answer",
            )
        for size in self.batch_sizes:
            if size < 1 or size > self.max_batch_size:
                raise _wrong("batch_sizes", size, f"sizes from 1 to max_batch_size ({self.max_batch_size})")
        if self.backend.startswith("tensorrt_llm"):
            from .backends import tensorrt_llm_options

            tensorrt_llm_options.check(self)

    @property
    def decode_batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes that get a decode graph: those asked for, and always 1 and max_batch_size."""
        return tuple(sorted({1, self.max_batch_size, *self.batch_sizes}))

    def replace(self, **changes: Any) -> BuildRecipe:
        """The same recipe with some fields changed; unknown fields raise RecipeError."""
        return from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        fields["batch_sizes"] = list(self.batch_sizes)
        return fields

    @property
    def short_name(self) -> str:
        """Readable part of the engine's folder name, for example stories-aot-int8-b4."""
        model = self.model.removeprefix("dummy:").rstrip("/").rsplit("/", 1)[-1]
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in model).strip(".") or "model"
        dummy = "dummy-" if self.model.startswith("dummy:") else ""
        return f"{dummy}{safe}-{self.backend}-{self.precision}-b{self.max_batch_size}"

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def from_dict(fields: dict[str, Any]) -> BuildRecipe:
    """A recipe from plain values, as a TOML file or a manifest holds them. A section that is named after the backend
    holds its options."""
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
    path = Path(path)
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"There is no recipe file {path.name!r}.",
            cause="The name is misspelt, or the path starts from another folder.",
            fix=f"Recipes here: {', '.join(sorted(p.name for p in path.parent.glob('*.toml'))) or 'none'}.",
        ) from None
    except OSError as error:
        raise RecipeError(f"{path.name} cannot be read: {error.strerror}.", fix="Give a TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path.name} is not valid TOML: {error}.", fix="Compare it with a file in engines/recipes/."
        ) from error
    return from_dict(fields)


def write(recipe: BuildRecipe, path: str | Path) -> Path:
    """Write a recipe as TOML; `read` gives back an equal one."""
    tables = {key: value for key, value in recipe.to_dict().items() if isinstance(value, dict)}
    lines = [f"{key} = {_toml(value)}" for key, value in recipe.to_dict().items() if key not in tables]
    tables[recipe.backend] = tables.pop("options")
    for name, table in tables.items():
        if table:
            lines += ["", f"[{name}]", *(f"{_key(key)} = {_toml(value)}" for key, value in table.items())]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(path)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    """A value as TOML writes it: JSON's way, but for tables within tables and characters beyond 16 bits."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _is_plain(value: Any) -> bool:
    """True for what TOML and JSON can both hold."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _from_fields(kind: type, fields: dict[str, Any], prefix: str = "") -> Any:
    known = [f.name for f in dataclasses.fields(kind)]
    for name in fields:
        if name not in known:
            raise RecipeError(
                f"A recipe has no field {prefix + name!r}.",
                cause="A misspelt name, or a setting that belongs under options.",
                fix=f"The fields are: {', '.join(prefix + k for k in known)}.",
            )
    return kind(**fields)


def _check_types(recipe: BuildRecipe) -> None:
    for name, kind in get_type_hints(BuildRecipe).items():
        value = getattr(recipe, name)
        plain = getattr(kind, "__origin__", kind)
        if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
            raise _wrong(name, value, f"a value of type {plain.__name__}")
    for name, switch in dataclasses.asdict(recipe.fusion).items():
        if not isinstance(switch, bool):
            raise _wrong(f"fusion.{name}", switch, "true or false")
    for name, option in recipe.options.items():
        if not isinstance(name, str) or not _is_plain(option):
            raise _wrong(f"options.{name}", option, "a text, number, true, false, or a list or table of these")
    for size in recipe.batch_sizes:
        if not isinstance(size, int) or isinstance(size, bool):
            raise _wrong("batch_sizes", size, "whole numbers")


def _one_of(name: str, value: Any, allowed: tuple, where: str = "") -> None:
    if value not in allowed:
        raise _wrong(name, value, f"one of {', '.join(map(str, allowed))}{where}")


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise _wrong(name, value, f"a whole number from {low} to {high}")


def _wrong(name: str, value: Any, allowed: str) -> RecipeError:
    return RecipeError(f"Recipe field {name} is {value!r}, which is not allowed.", fix=f"Give {allowed}.")
