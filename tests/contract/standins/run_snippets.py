"""Execute pieces of Python one after the other in one namespace, as cells of a notebook: [[name, source], ...] comes
on standard input. The names "prepare" and "clean up" are the test's own pieces. Used by test_snippets.py."""

import ast
import asyncio
import json
import sys

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])  # what the Hub would send
AutoTokenizer.from_pretrained = classmethod(lambda cls, name, **kwargs: tokenizer)
namespace = {"__name__": "__main__"}


async def run() -> None:
    for name, source in json.load(sys.stdin):
        code = compile(source, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        waiting = eval(code, namespace)  # a coroutine, if the piece awaits something
        if waiting is not None:
            await waiting


asyncio.run(run())
