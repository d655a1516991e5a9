"""The bundled model's source: a grammar of short stories, and the script that trains a model on them."""

from helpers.model.stories.grammar import ParseError, Story, draw, draw_corpus, entropy, parse

__all__ = ["ParseError", "Story", "draw", "draw_corpus", "entropy", "parse"]
