"""The errors of this package. Each says what happened, the likely cause, and what to do."""

from __future__ import annotations

import contextlib
import errno
import html
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any


class CourseError(Exception):
    """What happened, why it probably did, and the way out, in three plain sentences."""

    def __init__(self, what: str, *, cause: str = "", fix: str = ""):
        self.what, self.cause, self.fix = what, cause, fix
        self._is_folded = False  # whether a notebook has shown its traceback
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.cause:
            lines.append(f"Likely cause: {self.cause}")
        if self.fix:
            lines.append(f"Fix: {self.fix}")
        return printable("\n".join(lines))

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows as the error (IPython's own hook): these lines. The long traceback stands above them,
        folded, for those who see a page; who reads plain text has the lines alone."""
        if not self._is_folded:  # IPython asks more than once
            self._is_folded = True
            _show_folded(self)
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


def _show_folded(error: CourseError) -> None:
    from IPython.display import display

    frames = error.__traceback__
    while frames and frames.tb_frame.f_globals.get("__name__", "").startswith("IPython"):
        frames = frames.tb_next
    lines = "".join(traceback.format_exception(type(error), error, frames)[:-1])
    page = html.escape(printable(lines))
    folded = f"<details><summary>Where it happened</summary><pre>{page}</pre></details>"
    display({"text/html": folded}, raw=True)


def out_of_memory(error: Exception) -> OutOfMemory | None:
    """Our error for one that says that memory ran out, in Python or in a library; those of libraries have no type for
    it. None for any other."""
    words = str(error).lower()
    known = "out of memory", "can't allocate memory", "cannot allocate memory"
    if "static tls" in words or not (isinstance(error, MemoryError) or any(one in words for one in known)):
        return None
    return OutOfMemory(
        f"Memory ran out: {(str(error).splitlines() or ['Python had none left.'])[0]}",
        cause="Weights, KV cache (for max_batch_size sequences of max_seq_len tokens) and intermediate results do not "
        "fit beside what else is in memory.",
        fix="Close other engines, send fewer or shorter prompts, or build with smaller limits.",
    )


def starved(error: Exception) -> OutOfMemory | None:
    """The same, and how Python and the loader say it before anything of ours has begun."""
    early = any(words in str(error) for words in ("failed to map segment", "can't start new thread"))
    return out_of_memory(MemoryError(str(error)) if early else error)


def is_full(error: Exception) -> bool:
    """Whether a disk is full, or a limit on space reached. safetensors and torch, which write too, say it in words."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = str(error).lower()
    return getattr(error, "errno", None) in numbers or any(os.strerror(each).lower() in words for each in numbers)


def why_refused(error: Exception) -> str:
    """The likely cause of what the operating system refuses, by its number, or by its words where a library passes them
    on: what cannot be opened may be sound."""
    reasons = {
        "It belongs to another user, or its mode forbids it.": "EACCES EPERM",
        "It lies on a disk that is read-only.": "EROFS",
        "This process has as many files open as it may (ulimit -n): close some engines.": "EMFILE ENFILE",
        "The disk is full, or a limit on space is reached.": "ENOSPC EDQUOT EFBIG",
        "There is no room for another process or for more memory.": "EAGAIN ENOMEM",
        "Its disk has no locks, as some of a network have none: name a folder on a local disk.": "ENOLCK EOPNOTSUPP",
        "The disk or its network fails.": "EIO ESTALE ENXIO ENODEV",
        "The path is misspelt, a broken link, or leads to something else.": (
            "ENOENT ENOTDIR EEXIST EISDIR ELOOP ENAMETOOLONG EINVAL"
        ),
    }
    if "No usable temporary directory" in str(error):  # Python's words; its number is that of a missing file
        return "The disk is full, or no place for temporary files can be written: see TMPDIR."
    number = getattr(error, "errno", None)
    for cause, names in reasons.items():
        numbers = [getattr(errno, name) for name in names.split() if hasattr(errno, name)]
        if number in numbers or (number is None and any(os.strerror(each) in str(error) for each in numbers)):
            return cause
    return ""


def not_finite(tokens: int) -> NumericsError:
    """The error for logits that hold NaN or infinity. tokens: how many stand before the one that they are for."""
    return NumericsError(
        f"Behind token {tokens} the model's scores are not finite numbers.",
        cause="An intermediate result was too large for the precision; fp16 holds no more than 65504.",
        fix="Build with precision='bf16' or 'fp32'; if it stays, the checkpoint's weights are damaged.",
    )


def printable(text: str) -> str:
    """The text with control characters spelled out, because a terminal obeys them, and halves of a pair, which nothing
    can write. Line ends and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda c: ascii(c[0])[1:-1], text)


def shown(value: Any, longest: int = 80) -> str:
    """A wrong value as an error names it: short, whatever it is. longest: characters."""
    try:
        return f"{value!r:.{longest}}"
    except Exception:  # anybody's own __repr__; and Python spells out no whole number of more than 4300 digits
        return f"a value of type {type(value).__name__}"


def need(value: Any, kind: type, fix: str) -> None:
    """InputError for another thing than is asked for, such as an engine's folder in place of the engine."""
    if not isinstance(value, kind):
        raise InputError(f"{kind.__name__} is asked for, not {shown(value)}.", fix=fix)


def status_of(command: Callable[[], int | None], *, as_json: bool = False) -> int:
    """Run a terminal's command to its exit status. Whatever ends it is told in words, on any terminal; with as_json
    also as JSON on standard output."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal lacks is spelled out
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):  # bytes that are no text become half characters, which are refused in words
        sys.stdin.reconfigure(errors="surrogateescape")

    def tell(words: str, kind: str, what: str, cause: str = "", fix: str = "") -> None:
        with contextlib.suppress(OSError):  # it may go to a disk that is full
            if sys.stderr is not None:  # for print, None is the standard output
                print(words, file=sys.stderr, flush=True)
        if as_json:
            fields = {"type": kind, "what": what, "cause": cause, "fix": fix}
            try:
                print(json.dumps({"ok": False, "error": fields}, indent=1), flush=True)
            except OSError:
                _drop_output()

    try:
        status = command() or 0
        print(end="", flush=True)  # what cannot be written is noticed here; without a standard output nothing is
        return status
    except CourseError as error:
        kind = type(error).__name__
        tell(f"{kind}: {error}", kind, error.what, error.cause, error.fix)
        return 1
    except BrokenPipeError:  # who read the output, such as `head`, has enough
        _drop_output()
        return 141  # as a program that the signal SIGPIPE ends
    except OSError as error:
        what = f"The operating system refused: {error}."
        tell(what, "OSError", what)
        _drop_output()
        return 1
    except KeyboardInterrupt:
        what = "Interrupted; nothing half-built was left behind."
        tell(what, "KeyboardInterrupt", what)
        return 130
    except Exception as error:
        explained = starved(error)
        if explained is None:
            raise
        tell(f"OutOfMemory: {explained}", "OutOfMemory", explained.what, explained.cause, explained.fix)
        return 1


def _drop_output() -> None:
    """Let go of what could not be written, or Python writes it when it ends."""
    with contextlib.suppress(OSError, AttributeError):  # there may be no standard output, or one of no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
