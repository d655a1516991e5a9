"""The process in which a chat template is rendered: a request in JSON on standard input; the answer is the last line on
standard output.

{"source": "...", "tokens": {...}, "messages": [...]}    to ["rendered", text], ["refused", why] or ["failed", why]
"""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, utils
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30  # bytes of address space, where the system can limit it
SECONDS = 30  # of processor time: more than who waits for it allows, and an end where nobody waits any more
LONGEST = 2**22  # characters; a long prompt of a long-context model has a million


class Refusal(TemplateError):
    """What a template raises with raise_exception."""


class Generation(Extension):
    """{% generation %} marks what the assistant wrote, for training. Here only its content counts."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Scope:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Namespace(utils.Namespace):
    """Jinja's, without names that Python itself looks up."""

    def __init__(*args: Any, **attributes: Any) -> None:  # so that one of the names may be "self"
        self, *others = args
        utils.Namespace.__init__(self)
        for name, value in dict(*others, **attributes).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace takes no name such as {name!r}")
        super().__setitem__(name, value)


def raise_exception(message: object) -> None:
    raise Refusal(str(message))


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes what HTML would misread."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(source: str, tokens: dict[str, str], messages: list[dict[str, str]]) -> tuple[str, str]:
    """The text of the conversation with jinja as transformers sets it up (its utils/chat_template_utils.py)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": Namespace,
    }
    variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    text = ""
    try:
        for piece in environment.from_string(source).generate(**tokens, **variables):
            text += piece
            if len(text) > LONGEST:
                return "failed", f"it wrote more than {LONGEST} characters."
    except Refusal as error:
        return "refused", str(error)
    except Exception as error:  # the edge of a program of somebody else, which may raise anything
        return "failed", f"{type(error).__name__}: {error!s:.300}"
    return "rendered", text


if __name__ == "__main__":
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows; macOS refuses
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answer = render(**json.load(sys.stdin.buffer))
    sys.stdout.flush()  # what an environment's own start-up printed, such as a sitecustomize.py
    sys.stdout.buffer.write(f"\n{json.dumps(answer)}".encode())
