"""The errors of this package. Each says what happened, the likely cause, and what to do."""

from __future__ import annotations


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
        return "\n".join(lines)

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


class WorkerError(CourseError):
    """A worker process died, hung, or answered with something that is not the protocol."""
