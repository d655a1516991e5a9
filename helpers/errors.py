"""The errors of this package. Each says what happened, the likely cause, and what to do."""

from __future__ import annotations

import re
from typing import Any


class CourseError(Exception):
    """What happened, why it probably did, and the way out, in three plain sentences."""

    def __init__(self, what: str, *, cause: str = "", fix: str = ""):
        self.what, self.cause, self.fix = what, cause, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.cause:
            lines.append(f"Likely cause: {self.cause}")
        if self.fix:
            lines.append(f"Fix: {self.fix}")
        return printable("\n".join(lines))

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows instead of a long traceback (IPython's own hook for it)."""
        return [f"{type(self).__name__}: {self}"]


class RecipeError(CourseError):
    """A recipe field is wrong, or two fields contradict each other."""


class ModelError(CourseError):
    """A checkpoint cannot be found, read, or is of a kind that is not supported."""


class InputError(CourseError):
    """A prompt or a sampling setting that no engine could serve."""


class LimitError(InputError):
    """A request beyond what this engine was built for (batch, prompt length, sequence length)."""


class BuildError(CourseError):
    """The build of an engine failed; nothing was published."""


class StoreError(CourseError):
    """The folder of engines cannot be read or written."""


class EngineNotFound(CourseError):
    """No engine of that name or recipe has been built."""


class EngineCorrupt(CourseError):
    """An engine folder does not hold what its manifest says; it is not loaded."""


class EngineMismatch(CourseError):
    """An engine built for another machine, library version or tokenizer."""


class BackendUnavailable(CourseError):
    """The backend that was asked for is not installed or cannot run on this machine."""


class OutOfMemory(CourseError):
    """The device or the host has too little memory for what was asked."""


class NumericsError(CourseError):
    """The model's numbers ran out of what its precision can hold: there is no answer to give."""


class WorkerError(CourseError):
    """A worker process died, hung, or answered with something that is not the protocol."""


def printable(text: str) -> str:
    """The text with control characters spelled out, because a terminal obeys them. Line ends and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def shown(value: Any) -> str:
    """A wrong value as an error names it: short, whatever it is."""
    try:
        return f"{value!r:.80}"
    except Exception:  # anybody's own __repr__; and Python spells out no whole number of more than 4300 digits
        return f"a value of type {type(value).__name__}"
