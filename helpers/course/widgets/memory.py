"""The memory calculator: will it fit, where, and how many sequences of it?"""

from __future__ import annotations

from typing import Any

from helpers.course.memory import memory_table
from helpers.course.widgets.panel import Panel, control, row, slider
from helpers.display import Table
from helpers.errors import CourseError
from helpers.model.checkpoint import NAMED, SHAPES, find_checkpoint
from helpers.recipe import BuildRecipe
from helpers.recipe.fields import PRECISIONS


def memory_calculator(model: str = "dummy:llama-3.2-1b", **fields: Any) -> MemoryCalculator:
    """Controls for model, precision, batch and length over `memory_table`. fields: where they stand at first, as a
    recipe's."""
    return MemoryCalculator(
        # What is counted has no prompt: its length would only forbid shorter sequences.
        BuildRecipe(model=model, **{"precision": "bf16", "max_seq_len": 1024, **fields, "max_input_len": 1})
    )


class RecipePanel(Panel):
    """Controls for fields of a recipe, by their names."""

    def __init__(self, recipe: BuildRecipe, **more: Any):
        super().__init__()
        find_checkpoint(recipe.model)  # refused here if it is missing
        self._recipe = recipe
        self.fields = {
            "model": control("Dropdown", "model", options=models(recipe.model), value=recipe.model),
            "precision": control("Dropdown", "precision", options=PRECISIONS[recipe.backend], value=recipe.precision),
            **more,
        }
        self.controls = [*self.fields.values()]

    def recipe(self) -> BuildRecipe:
        return self._recipe.replace(**{name: field.value for name, field in self.fields.items()})


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


class MemoryCalculator(RecipePanel):
    def __init__(self, recipe: BuildRecipe):
        import ipywidgets as w

        lengths = sorted({*(2**power for power in range(5, 18)), recipe.max_seq_len})
        super().__init__(
            recipe,
            max_batch_size=slider("sequences", recipe.max_batch_size, 1, 1024),
            max_seq_len=control("SelectionSlider", "tokens in each", options=lengths, value=recipe.max_seq_len),
        )
        self.view = w.VBox([row(*self.controls), self.errors, self.output])
        self.redraw_with(self.draw, *self.controls)

    def twin(self) -> Table:
        return memory_table(self.recipe())
