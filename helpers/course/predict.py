"""Guess first: a learner's number or choice before a cell, shown beside the result after it.

    predict("engine against eager", times=None)     # the learner's guess in place of None, or in the control below
    reveal("engine against eager", times=6.4)       # in the cell after, with what was measured
    summary("01")                                   # at the end of the notebook

Nothing predicted is fine: then only the result is shown, and a notebook runs without a person.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from helpers.course import learner
from helpers.course.values import choice, number
from helpers.course.widgets.panel import Panel, control
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
    def distance(self) -> tuple[bool, str]:
        """Whether the guess is near the result, and how far from it in words."""
        guess, result = self.guess, self.result
        if not isinstance(guess, float) or not isinstance(result, float):
            return guess == result, "right" if guess == result else "another"
        if guess != result and guess * result <= 0:
            return False, "not of its kind: one is zero or below"
        ratio = guess / result if guess != result else 1.0
        if 0.95 <= ratio <= 1.05:
            return True, "as it is"
        words = f"{ratio:.3g} times too much" if ratio > 1 else f"{1 / ratio:.3g} times too little"
        return 1 / NEAR <= ratio <= NEAR, words

    def words(self, value: float | str | None) -> str:
        if not isinstance(value, float):
            return str(value)
        figure = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
        return f"{figure} {self.unit}"

    def __repr__(self) -> str:
        if self.result is None and self.guess is None:
            what = f"one of: {', '.join(self.options)}" if self.options else f"a number of {self.unit}"
            return f"{self.name}: no guess yet. Give {what}, in the field or in place of None, before the next cell."
        if self.result is None:
            return f"{self.name}: your guess is {self.words(self.guess)}. The next cell shows the result."
        if self.guess is None:
            return f"{self.name}: {self.words(self.result)}. Nobody guessed."
        late = " It came after the result, so it does not count." if self.late else ""
        return (
            f"{self.name}: you guessed {self.words(self.guess)}, the result is {self.words(self.result)}: "
            f"{self.distance[1]}.{late}"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.guess is None and self.result is None and find_spec("ipywidgets"):
            return GuessControl(self)._repr_mimebundle_()
        return {"text/plain": repr(self)}, {}


class GuessControl(Panel):
    """A field for a number, or buttons for a choice."""

    def __init__(self, prediction: Prediction):
        import ipywidgets as w

        super().__init__()
        self.prediction = prediction
        if prediction.options:  # buttons: JupyterLab keeps the arrow keys, which radio buttons need, for itself
            self.field = control("ToggleButtons", "your guess", options=prediction.options, value=None)
            self.field.style.button_width = "auto"
        else:
            self.field = control("Text", "your guess", placeholder=prediction.unit, continuous_update=False)
        self.controls = [self.field]
        self.view = w.VBox([self.field, self.errors, self.output])
        self.draw()
        self.field.observe(self._note, names="value")

    def _note(self, _: Any) -> None:
        """Note and draw a guess at once: what other panels do a moment later comes after a cell that waits, and that
        may reveal."""
        with self._shown_errors():
            self.draw()

    def draw(self) -> None:
        if self.field.value:
            unit = {self.prediction.unit: self.field.value}
            self.prediction = predict(self.prediction.name, of=self.prediction.options, **unit)
        super().draw()

    def twin(self) -> str:
        return repr(self.prediction)


_here: dict[str, Prediction] = {}  # of this kernel, by name


def predict(name: str, *, of: Sequence[str] = (), **guess: Any) -> Prediction:
    """Note a guess: a number under the name of its unit (`times=3`, `seconds=None`), or `choice=None` out of `of`."""
    unit, value = _single("predict", name, guess)
    if (unit == CHOICE) != bool(of):
        raise InputError(f"A choice needs its options: predict({name!r}, choice=None, of=[...]).")
    prediction = Prediction(name, unit, tuple(map(str, of)))
    before = _here.get(name)
    if value is not None:
        prediction.guess = choice(value, prediction.options) if of else number(value)
    elif before:  # perhaps by the control
        prediction.guess = before.guess
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
            "" if item.guess is None else item.distance[1] + (" (too late)" if item.late else ""),
        )
        for item in known
    ]
    here = {item.name: item.distance[0] for item in counted}
    every = {notebook: here} if here else {}
    try:
        if here:
            with learner.changed() as content:
                content["predictions"].setdefault(notebook, {}).update(here)  # beside those of an earlier kernel
        every = learner.read()["predictions"]
    except StoreError as error:  # it fails nothing: the table is of this kernel
        print(error)
    sense = "; ".join(f"notebook {number}: {sum(x.values())} of {len(x)}" for number, x in sorted(every.items()))
    near = f"the right choice, or within a factor of {NEAR:g}"
    caption = f"Your guesses. Near ({near}): {sense}." if sense else "Nothing was predicted. Guess first, next time."
    return Table(caption, ("what", "your guess", "the result", "your guess was"), rows)
