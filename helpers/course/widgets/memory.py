"""The memory calculator: will it fit, where, and how many sequences of it?"""

from __future__ import annotations

from typing import Any

from helpers.course.memory import memory_table
from helpers.course.widgets.panel import Panel, as_html, control, row, slider
from helpers.display import Table
from helpers.errors import CourseError
from helpers.model.checkpoint import NAMED, SHAPES, find_checkpoint
from helpers.recipe import BuildRecipe
from helpers.recipe.fields import PRECISIONS


def memory_calculator(model: str = "dummy:llama-3.2-1b", **fields: Any) -> MemoryCalculator:
    """Controls for model, precision, batch and length over `memory_table`. fields: where they stand at first, as a
    recipe's."""
    return MemoryCalculator(BuildRecipe(model=model, **{"precision": "bf16", "max_seq_len": 1024, **fields}))


def models(*more: str) -> list[str]:
    """The models that are here: by name, or for dummy weights by shape."""
    every = ["stories", *NAMED, *(f"dummy:{shape.name}" for shape in sorted(SHAPES.iterdir())), *more]
    return [name for name in dict.fromkeys(every) if _is_here(name)]


def _is_here(name: str) -> bool:
    try:
        find_checkpoint(name)
    except CourseError:
        return False
    return True


class MemoryCalculator(Panel):
    def __init__(self, recipe: BuildRecipe):
        import ipywidgets as w

        super().__init__()
        self._recipe = recipe
        self.model = control("Dropdown", "model", options=models(recipe.model), value=recipe.model)
        self.precision = control("Dropdown", "precision", options=PRECISIONS["aot"], value=recipe.precision)
        self.batch = slider("sequences", recipe.max_batch_size, 1, 1024)
        lengths = [2**power for power in range(5, 18)]
        self.length = control(
            "SelectionSlider",
            "tokens in each",
            options=sorted({*lengths, recipe.max_seq_len}),
            value=recipe.max_seq_len,
        )
        self.controls = [self.model, self.precision, self.batch, self.length]
        self.table = w.HTML()
        self.view = w.VBox([row(*self.controls), self.errors, self.table])
        self.redraw_with(self.draw, *self.controls)
        self._soon(self.draw)

    def recipe(self) -> BuildRecipe:
        return self._recipe.replace(
            model=self.model.value,
            precision=self.precision.value,
            max_batch_size=self.batch.value,
            max_seq_len=self.length.value,
            max_input_len=min(self._recipe.max_input_len, self.length.value - 1),
        )

    def draw(self) -> None:
        self.table.value = as_html(self.twin())

    def _show_error(self, words: str) -> None:
        self.table.value = ""  # what is there belongs to other settings
        super()._show_error(words)

    def twin(self) -> Table:
        return memory_table(self.recipe())
