"""Generate with an engine that is built: python -m helpers.basic [PROMPT ...]

The second of the two scripts of a TensorRT-LLM tutorial: load the engine, set the sampling, generate, print.
"""

from __future__ import annotations

import argparse
import sys

from helpers import SamplingParams, load
from helpers.errors import status_of
from helpers.store import list_engines, read_manifest

PROMPTS = ["Hello, my name is", "The president of the United States is"]


def built_last() -> str:
    """The name of the language model that was built last; the notebooks build single modules too."""
    for folder in reversed(list_engines()):
        if read_manifest(folder)["identity"].get("kind") == "language model":
            return folder.name
    return "stories-aot"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.basic", description="Generate with an engine.")
    parser.add_argument("prompts", nargs="*", help="your prompts instead of the two built in")
    parser.add_argument("--engine", help="an engine's name; default: the model built last")
    parser.add_argument("--max-tokens", type=int, default=50)
    settings = parser.parse_args()

    # 1. How to choose each next token. The same seed gives the same text.
    sampling = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=settings.max_tokens, seed=0)

    # 2. The engine, with its own tokenizer. Nothing is compiled here.
    name = settings.engine or built_last()
    print(f"Engine: {name}")
    with load(name) as engine:
        # 3. All prompts as batches of what the engine was built for.
        prompts = settings.prompts or PROMPTS
        size = engine.recipe.max_batch_size
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            for prompt, answer in zip(batch, engine.generate(batch, sampling), strict=True):
                print(f"Prompt: {prompt!r}, Generated text: {answer.text!r}")
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
