"""One line of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from helpers.errors import printable


@dataclass(frozen=True)
class Check:
    """status: "OK", "warning" (the course runs, something is missing or slow) or "failure"."""

    status: str
    found: str  # what is so on this machine
    fix: str = ""
    name: str = ""

    def __str__(self) -> str:
        line = printable(f"{self.status:<8} {self.name:<22} {self.found}")
        return f"{line}\n{'':<9}Fix: {self.fix}" if self.fix else line


ok, warning, failure = partial(Check, "OK"), partial(Check, "warning"), partial(Check, "failure")
