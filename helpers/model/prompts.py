"""What passes for a prompt, and what only looks like one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from helpers.errors import InputError, shown


def as_list(prompts: Any) -> list[Any]:
    """One prompt, or several: a text, a list of ids, a list of texts, a list of lists of ids."""
    if isinstance(prompts, str):
        return [prompts]
    prompts = plain_list(prompts)
    return [prompts] if prompts and all(map(is_id, prompts)) else prompts


def plain_list(values: Any) -> list[Any]:
    """A list, a tuple or an array (numpy, torch) as a list. Nothing else is taken, because the keys of a dict or the
    bytes of a text, also as an array of bytes, would pass for prompts."""
    if hasattr(values, "dtype") and hasattr(values, "tolist") and not _is_bytes(values):
        with contextlib.suppress(RuntimeError, TypeError):  # a tensor without data, or no plain one
            values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise no_prompt(values)
    return list(values)


def is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def no_prompt(value: Any) -> InputError:
    fix = "Give a str, or a list of ints such as engine.tokenize(text) returns."
    if isinstance(value, Mapping) and "input_ids" in value:
        fix = "Give its ids alone: prompt['input_ids']."
    elif _is_bytes(value):
        fix = "Give it as text: bytes(prompt).decode()."
    what = "These are no token ids, but" if isinstance(value, str) else "A prompt is a text or a list of token ids, not"
    return InputError(f"{what} {type(value).__name__}: {shown(value)}.", fix=fix)


def _is_bytes(value: Any) -> bool:
    return isinstance(value, (bytes, bytearray)) or str(getattr(value, "dtype", "")).endswith("uint8")
