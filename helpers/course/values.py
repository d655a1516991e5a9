"""What a learner gives as an answer or a guess, read as a plain value, whatever library it came from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from helpers.errors import InputError, shown

THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?")


def plain(value: Any) -> Any:
    """Tensors and arrays as (nested) lists or single values; tuples, sets and generators as lists; others unchanged."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        return value
    try:
        return [plain(item) for item in value]
    except RecursionError:
        raise InputError(f"{shown(value)} holds itself.") from None


def number(value: Any) -> float:
    """A finite number: of Python, numpy or torch, a Fraction or Decimal, one alone in a list, or written as text."""
    try:
        one = alone(value)
        if isinstance(one, str):
            one = one.replace(",", "") if THOUSANDS.fullmatch(one.strip()) else one
        result = math.nan if isinstance(one, (bool, bytes, bytearray)) else float(one)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        what = "a number" if not isinstance(value := plain(value), list) else f"one number, but a row of {len(value)}"
        raise InputError(f"{shown(value)} is not {what}. Give one alone, without its unit, such as 2.5.")
    return result


def whole(value: Any) -> int:
    """The same, and nothing after the point."""
    result = number(value)
    if result != int(result):
        raise InputError(f"{shown(value)} is not a whole number.")
    return int(result)


def numbers(value: Any, read: Callable[[Any], float] = number) -> list[float]:
    """A row of numbers: a list, tuple, array, tensor or generator of them, flat. read: `whole` for whole ones."""
    items = plain(value)
    while isinstance(items, list) and len(items) == 1 and isinstance(items[0], list):  # a batch of one row
        items = items[0]
    if not isinstance(items, list):
        raise InputError(f"{shown(value)} is not a row of numbers.")
    return [read(item) for item in items]


def choice(value: Any, options: Sequence[str]) -> str:
    """Which of the options a text names, in upper or lower case, with any signs between its words, and with other words
    around it: "the seed", "max_batch_size=4". A text that names two is no choice."""
    key = _words(value)
    named = [o for o in options if f" {_words(o)} " in f" {key} " or _words(o).replace(" ", "") == key.replace(" ", "")]
    longest = max(named, key=len, default="")
    if named and all(_words(option) in _words(longest) for option in named):  # "int8" is named by "aot int8" too
        return longest
    raise _no_option(value, options)


def choices(value: Any, options: Sequence[str]) -> set[str]:
    """Which of the options are named: in a list, tuple or set of texts, or in one text with commas between them."""
    value = alone(value)
    items = re.split(r"[,;&+\n]| and ", value) if isinstance(value, str) else value
    items = items if isinstance(items, list) else [items]
    known = {_words(option): option for option in options}
    for item in items:
        if item != "" and _words(item) not in known:
            raise _no_option(item, options)
    return {known[_words(item)] for item in items if item != ""}


def _no_option(value: Any, options: Sequence[str]) -> InputError:
    return InputError(f"{shown(value)} is not one of these: {', '.join(options)}.")


def alone(value: Any) -> Any:
    """A plain value, without lists that hold nothing but it."""
    value = plain(value)
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def _words(value: Any) -> str:
    """A text, or the name of what has one, in lower case and with a space for all signs."""
    value = alone(value)
    name = getattr(value, "name", None) or getattr(value, "__name__", None) or value
    return re.sub(r"[\W_]+", " ", name if isinstance(name, str) else shown(name)).strip().casefold()


# ---- figures that were read from a table ------------------------------------------------------------------------

Range = tuple[float, float]


def printed(value: float, decimals: int) -> Range:
    """All that a table may mean by the figure that it shows for this value; the value itself is among it."""
    half = 0.5 * 10.0**-decimals
    return round(value, decimals) - half, round(value, decimals) + half


def span(formula: Callable[..., float], *figures: Range) -> Range:
    """What a formula may give for such figures, if it rises or falls with each of them."""
    results = [formula(*corner) for corner in product(*figures)]
    return min(results), max(results)


def within(answer: Any, allowed: Range, mistakes: Mapping[str, float] | None = None) -> float:
    """The answer as a number, if it lies in the range or rounds into it. mistakes: what to say to whom has which
    number, beside those that are usual everywhere."""
    value, (low, high) = number(answer), allowed
    slack = 0.005 * max(abs(low), abs(high))
    if low - slack <= value <= high + slack:
        return value
    middle = (low + high) / 2
    turned = "That is the other way round: what is divided by what?"
    unit = "Look at the unit: that is {} times as much as it should be."
    everywhere = [(turned, 1 / middle), (turned, 1e3 / middle)]
    everywhere += [(unit.format(f"{factor:g}"), factor * middle) for factor in (0.001, 1000, 8)]
    for words, usual in [*(mistakes or {}).items(), *everywhere]:
        if abs(value - usual) <= 0.01 * abs(usual):
            raise InputError(words)
    raise InputError(f"{shown(answer)} is too {'small' if value < low else 'large'}.")
