"""The build explorer: a recipe by controls, what it would take, and the build itself."""

from __future__ import annotations

import html
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers import recipe as recipes
from helpers.course.memory import expected_seconds, plan
from helpers.course.widgets.memory import RecipePanel
from helpers.course.widgets.panel import as_html, button, control, row, slider
from helpers.display import Table
from helpers.engine import inspect, need_compiled
from helpers.errors import BuildError
from helpers.machine import commands
from helpers.paths import PROJECT, owned_folder
from helpers.recipe import COMPILED, BuildRecipe
from helpers.recipe.fields import OPTIMIZATION_LEVELS

# `helpers build`, interrupted once its input closes: by Stop, or since the kernel has ended, however it ended. A kernel
# ignores interrupts between cells, and what it starts would ignore them too.
COMMAND = """
import _thread, os, signal, threading
def interrupt():
    os.read(0, 1)
    if os.name == "posix":
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # it may wait, and wakes up
    else:
        _thread.interrupt_main()
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=interrupt, daemon=True).start()
import helpers.__main__
"""
PATIENCE = 15.0  # seconds that a cancelled build may take to clear away what it has written


def build_explorer(**fields: Any) -> BuildExplorer:
    """Controls for a recipe; what its engine takes beside them; a build that can be stopped. fields: a recipe's."""
    level = {"optimization_level": 0} if fields.get("backend", BuildRecipe.backend) in COMPILED else {}
    recipe = BuildRecipe(**{"max_batch_size": 4, **level, **fields})
    need_compiled(recipe)
    return BuildExplorer(recipe)


class BuildExplorer(RecipePanel):
    def __init__(self, recipe: BuildRecipe):
        import ipywidgets as w

        level = recipe.optimization_level
        super().__init__(
            recipe,
            max_batch_size=slider("max_batch_size", recipe.max_batch_size, 1, max(64, recipe.max_batch_size)),
            max_input_len=slider("max_input_len", recipe.max_input_len, 1, max(2048, recipe.max_input_len)),
            max_seq_len=slider("max_seq_len", recipe.max_seq_len, 3, max(4096, recipe.max_seq_len)),
            optimization_level=control("Dropdown", "optimization_level", options=OPTIMIZATION_LEVELS, value=level),
        )
        self.fuse = control("Checkbox", "fuse operations into kernels", value=recipe.fusion.kernels, indent=False)
        self.button = button("Build", "Compile this recipe", lambda: self._start(self._build()))
        self.button.button_style = "primary"
        self.stop_button.tooltip = "Cancel the build; nothing is left of it"
        self.bar = w.FloatProgress(0, min=0, max=1, description="build", layout=w.Layout(display="none"))
        self.log, self.report = w.HTML(), w.HTML()
        self.shown = [self.output, self.log, self.report]
        settings = [*self.controls, self.fuse]
        self.controls = [*settings, self.button]
        buttons = row(self.button, self.stop_button, self.bar)
        self.view = w.VBox([row(*settings), self.errors, self.output, buttons, self.log, self.report])
        self.redraw_with(self.draw, *settings)

    def recipe(self) -> BuildRecipe:
        return super().recipe().replace(fusion={**vars(self._recipe.fusion), "kernels": self.fuse.value})

    def _build(self) -> Iterator[float]:
        """In a process of its own, as `helpers build` does it: so the kernel stays free, and it can be interrupted."""
        recipe, started = self.recipe(), time.monotonic()
        expected = expected_seconds(recipe)
        self.bar.layout.display, self.bar.value, self.report.value = "", 0, ""
        with owned_folder("course-build-") as folder:
            file, log = recipes.write(recipe, folder / "recipe.toml"), folder / "log"
            paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-c", COMMAND, "build", str(file)],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"},
                    **commands.OWN_SESSION,
                )
            assert process.stdin is not None
            try:
                while process.poll() is None and not self._stopping:
                    seconds = time.monotonic() - started
                    self.bar.value = min(0.98, seconds / expected)
                    self._show_log(log, f"{seconds:.0f} s of about {expected:.0f} s")
                    yield 0.25
                if process.poll() is None:
                    process.stdin.close()  # it clears away what it has written
                    self._show_log(log, "cancelling ...")
                    deadline = time.monotonic() + PATIENCE
                    while process.poll() is None and time.monotonic() < deadline:
                        yield 0.1
                ended = process.poll() not in (None, -9)  # what is killed, by us or the system, leaves its files
            finally:
                commands.kill_all(process)
                process.stdin.close()
                process.wait()
                self.bar.layout.display = "none"
            words = log.read_text(encoding="utf-8", errors="replace").strip()
        self.draw()
        if process.returncode == 0:  # perhaps before Stop reached it
            self.log.value = f"<pre>{html.escape(words)}</pre>"
            self.report.value = as_html(inspect(recipe))
        elif self._stopping:
            left = "Nothing is left of this build." if ended else "It had to be killed: the next build clears it away."
            self.log.value = f"<p>Cancelled. {left}</p>"
        else:
            raise BuildError(f"The build failed.\n{words}")

    def _show_log(self, log: Path, now: str) -> None:
        words = log.read_text(encoding="utf-8", errors="replace")
        self.log.value = f"<pre>{html.escape(words)}{html.escape(now)}</pre>"

    def twin(self) -> Table:
        return plan(self.recipe())
