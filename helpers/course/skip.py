"""A cell that cannot do its work on this machine says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.errors import ModelError
from helpers.paths import PYTHON

if TYPE_CHECKING:
    from helpers.model.checkpoint import Checkpoint


def skip(reason: str) -> None:
    """Say in a cell's output that its work is not done on this machine, and why.

    It does not end the cell, so the cell branches: `if why := ...: skip(why)`, and the work under `else`.
    """
    from IPython.display import display

    # The runner reads the metadata, people read the text.
    display({"text/plain": f"Skipped: {reason}"}, raw=True, metadata={"skipped": reason})


def need_model(name: str) -> Checkpoint | None:
    """The checkpoint of this name. Where it is not on this machine, the cell says how to get it, and so does every cell
    after it instead of running. To run the cell again, once the model is there, takes that back."""
    from IPython import get_ipython

    from helpers.model.checkpoint import find_checkpoint

    shell = get_ipython()
    before_cells = shell.input_transformers_cleanup if shell else []
    before_cells[:] = [transformer for transformer in before_cells if not isinstance(transformer, _SkipCell)]
    try:
        checkpoint = find_checkpoint(name)
        if not checkpoint.has_tokenizer:
            folder = checkpoint.folder  # and not the name: from_pretrained knows no ~, and a Hub id is no folder
            older = (folder / "tokenizer.model").exists() or (folder / "vocab.json").exists()
            fix = (
                f"Make it: {PYTHON} -m pip install sentencepiece, then in Python transformers.AutoTokenizer."
                f"from_pretrained({str(folder)!r}).backend_tokenizer.save({str(folder / 'tokenizer.json')!r})"
            )
            saved = (
                f"Its tokenizer was not saved with it. In Python: transformers.AutoTokenizer.from_pretrained(BASE)."
                f"save_pretrained({str(folder)!r}), where BASE is the model that it was tuned from."
            )
            raise ModelError(f"{name!r} has no tokenizer.json.", fix=fix if older else saved)
        return checkpoint
    except ModelError as error:
        if not shell:
            raise
        reason = f"{error.what} {error.fix}"
        before_cells.append(_SkipCell(reason))
        skip(reason)
        return None


@dataclass(frozen=True)
class _SkipCell:
    """IPython hands each cell's lines to it and runs what it returns."""

    reason: str

    def __call__(self, lines: list[str]) -> list[str]:
        if any("need_model(" in line for line in lines):
            return lines
        return ["from helpers.course.skip import skip\n", f"skip({self.reason!r})\n"]
