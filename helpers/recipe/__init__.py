"""What to build, and which options each backend takes."""

from helpers.recipe.fields import BACKENDS, COMPILED, PRECISIONS, Fusion
from helpers.recipe.recipe import BuildRecipe, from_dict, read, write

__all__ = ["BACKENDS", "COMPILED", "PRECISIONS", "BuildRecipe", "Fusion", "from_dict", "read", "write"]
