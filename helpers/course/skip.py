"""A cell that cannot do its work on this machine says so."""

from __future__ import annotations


def skip(reason: str) -> None:
    """Say in a cell's output that its work is not done on this machine, and why.

    It does not end the cell, so the cell branches: `if why := ...: skip(why)`, and the work under `else`.
    """
    from IPython.display import display

    # The runner reads the metadata, people read the text.
    display({"text/plain": f"Skipped: {reason}"}, raw=True, metadata={"skipped": reason})
