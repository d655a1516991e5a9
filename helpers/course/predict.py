"""Guess first: a learner's number or choice before a cell, shown beside the result after it.

    predict("engine against eager", times=None)     # the learner's guess in place of None
    reveal("engine against eager", times=6.4)       # in the cell after, with what was measured
    summary("01")                                   # at the end of the notebook

Nothing predicted is fine: then only the result is shown, and a notebook runs without a person.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from helpers.course import learner
from helpers.course.values import choice, number
from helpers.display import Table
from helpers.errors import CourseError, InputError, StoreError

NEAR = 1.5  # a number within this factor of the result is near
CHOICE = "choice"


@dataclass
class Prediction:
    """A guess, and the result once it is known. The last line of a cell shows it."""

    name: str
    unit: str
    options: tuple[str, ...] = ()
    guess: float | str | None = None
    result: float | str | None = None
    late: bool = False  # changed after the result was shown

    @property
    def near(self) -> bool:
        return self.distance in ("as it is", "right") or 1 / NEAR <= self._ratio() <= NEAR

    @property
    def distance(self) -> str:
        """How far the guess is from the result, in words."""
        if self.unit == CHOICE:
            return "right" if self.guess == self.result else "another"
        ratio = self._ratio()
        if 0.95 <= ratio <= 1.05:
            return "as it is"
        if ratio <= 0:
            return "not of its kind: one is zero or below"
        return f"{ratio:.3g} times too much" if ratio > 1 else f"{1 / ratio:.3g} times too little"

    def _ratio(self) -> float:
        """Guess over result; 0 where there is none to take."""
        if not isinstance(self.guess, float) or not isinstance(self.result, float):
            return 0.0
        if self.guess == self.result:
            return 1.0
        return self.guess / self.result if self.guess * self.result > 0 else 0.0

    def words(self, value: float | str | None) -> str:
        if not isinstance(value, float):
            return str(value)
        figure = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
        return f"{figure} {self.unit}"

    def __repr__(self) -> str:
        if self.result is None and self.guess is None:
            what = f"one of: {', '.join(self.options)}" if self.options else f"a number of {self.unit}"
            return f"{self.name}: no guess yet. Put {what} in place of None, and run this cell before the next."
        if self.result is None:
            return f"{self.name}: your guess is {self.words(self.guess)}. The next cell shows the result."
        if self.guess is None:
            return f"{self.name}: {self.words(self.result)}. Nobody guessed."
        late = " It came after the result, so it does not count." if self.late else ""
        return (
            f"{self.name}: you guessed {self.words(self.guess)}, the result is {self.words(self.result)}: "
            f"{self.distance}.{late}"
        )


_here: dict[str, Prediction] = {}  # of this kernel, by name


def predict(name: str, *, of: Sequence[str] = (), **guess: Any) -> Prediction:
    """Note a guess: a number under the name of its unit (`times=3`, `seconds=None`), or `choice=None` out of `of`."""
    unit, value = _single("predict", name, guess)
    if (unit == CHOICE) != bool(of):
        raise InputError(f"A choice needs its options: predict({name!r}, choice=None, of=[...]).")
    prediction = Prediction(name, unit, tuple(of))
    if value is not None:
        prediction.guess = choice(value, prediction.options) if of else number(value)
    before = _here.get(name)
    if before and before.result is not None:
        prediction.result, prediction.late = before.result, before.late or prediction.guess != before.guess
    _here[name] = prediction
    return prediction


def reveal(name: str, **result: Any) -> Prediction:
    """Show the guess of that name beside the result, given under the same unit. Without a guess it shows the result."""
    unit, value = _single("reveal", name, result)
    prediction = _here.setdefault(name, Prediction(name, unit))
    if prediction.unit != unit:
        raise InputError(f"{name!r} was predicted in {prediction.unit} and is revealed in {unit}.")
    if value is not None:  # a machine that cannot measure it has no result
        prediction.result = _result(prediction, value)
    return prediction


def _result(prediction: Prediction, value: Any) -> float | str | None:
    """The result as what was guessed: nothing that is measured makes a notebook fail."""
    try:
        return choice(value, prediction.options or (str(value),)) if prediction.unit == CHOICE else number(value)
    except CourseError:
        return str(value) if prediction.unit == CHOICE else None


def _single(call: str, name: str, given: dict[str, Any]) -> tuple[str, Any]:
    if len(given) != 1:
        raise InputError(
            f"{call}({name!r}) takes one value, under the name of its unit.", fix=f"Such as: {call}({name!r}, times=3)"
        )
    return next(iter(given.items()))


def summary(notebook: str) -> Table:
    """The guesses of this notebook beside the results, and how many were near, here and in the notebooks before."""
    known = [item for item in _here.values() if item.result is not None]
    counted = [item for item in known if item.guess is not None and not item.late]
    rows = [
        (
            item.name,
            "-" if item.guess is None else item.words(item.guess),
            item.words(item.result),
            "" if item.guess is None else item.distance + (" (too late)" if item.late else ""),
        )
        for item in known
    ]
    here = {item.name: item.near for item in counted}
    every = {notebook: here} if here else {}
    try:
        if here:
            with learner.changed() as content:
                content["predictions"][notebook] = here
        every = learner.read()["predictions"]
    except StoreError as error:  # it fails nothing: the table is of this kernel
        print(error)
    sense = "; ".join(f"notebook {number}: {sum(x.values())} of {len(x)}" for number, x in sorted(every.items()))
    near = f"the right choice, or within a factor of {NEAR:g}"
    caption = f"Your guesses. Near ({near}): {sense}." if sense else "Nothing was predicted. Guess first, next time."
    return Table(caption, ("what", "your guess", "the result", "your guess was"), rows)
