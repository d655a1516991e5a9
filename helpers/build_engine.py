"""Build an engine, once: python -m helpers.build_engine [--model stories] [--precision fp32] ...

The first of the two scripts of a TensorRT-LLM tutorial; the second, helpers.basic, uses what this one leaves behind.
"""

from __future__ import annotations

import argparse
import sys

from helpers import BuildRecipe, build
from helpers.errors import status_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.build_engine", description="Build an engine, once.")
    parser.add_argument("--model", default="stories", help="'stories', a Hub id, or a checkpoint folder")
    parser.add_argument("--backend", default="aot")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--max-batch-size", type=int, default=4)
    parser.add_argument("--max-input-len", type=int, default=64)
    parser.add_argument("--max-seq-len", type=int, default=256)
    settings = parser.parse_args()

    # 1. The recipe: which model, for which limits. A wrong value is refused here, before any work.
    recipe = BuildRecipe(**vars(settings))

    # 2. The build: minutes for a large model, nothing at all if this engine is there already.
    folder = build(recipe)

    print(f"Engine: {folder.name}")
    print(f"Use it: python -m helpers.basic --engine {folder.name}")
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
