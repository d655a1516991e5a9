"""The errors of this package. Each says what happened, the likely cause, and what to do."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable
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


def out_of_memory(error: Exception) -> OutOfMemory | None:
    """Our error for one that says that memory ran out, in Python or in a library; those of libraries have no type for
    it. None for any other."""
    words = str(error).lower()
    if not (isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words):
        return None
    return OutOfMemory(
        f"Memory ran out: {(str(error).splitlines() or ['Python had none left.'])[0]}",
        cause="Weights, KV cache (for max_batch_size sequences of max_seq_len tokens) and intermediate results do not "
        "fit beside what else is in memory.",
        fix="Close other engines, send fewer or shorter prompts, or build with smaller limits.",
    )


def not_finite(tokens: int) -> NumericsError:
    """The error for logits that hold NaN or infinity. tokens: how many stand before the one that they are for."""
    return NumericsError(
        f"Behind token {tokens} the model's scores are not finite numbers.",
        cause="An intermediate result was too large for the precision; fp16 holds no more than 65504.",
        fix="Build with precision='bf16' or 'fp32'; if it stays, the checkpoint's weights are damaged.",
    )


def printable(text: str) -> str:
    """The text with control characters spelled out, because a terminal obeys them. Line ends and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def shown(value: Any) -> str:
    """A wrong value as an error names it: short, whatever it is."""
    try:
        return f"{value!r:.80}"
    except Exception:  # anybody's own __repr__; and Python spells out no whole number of more than 4300 digits
        return f"a value of type {type(value).__name__}"


def status_of(command: Callable[[], int | None]) -> int:
    """Run a terminal's command to its exit status. Whatever ends it is told in words, on any terminal."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal lacks is spelled out
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):  # bytes that are no text become half characters, which are refused in words
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        status = command() or 0
        print(end="", flush=True)  # what cannot be written is noticed here; without a standard output nothing is
        return status
    except CourseError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        with contextlib.suppress(OSError, AttributeError):  # there may be no standard output, or one of no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python writes the rest when it ends
        if isinstance(error, BrokenPipeError):  # who read the output, such as `head`, has enough
            return 141  # as a program that the signal SIGPIPE ends
        print(f"The operating system refused: {error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; nothing half-built was left behind.", file=sys.stderr)
        return 130
