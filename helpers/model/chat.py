"""A conversation as one prompt, written by the checkpoint's own chat template as transformers does it.

A chat template is a small program in the language jinja, and it comes with the checkpoint, from whoever made that. So
it runs in jinja's sandbox, where it reaches nothing of Python, and in a process of its own (chat_process.py), where its
time, memory and output are limited. Starting that process takes about a tenth of a second.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from typing import Any

from helpers.errors import InputError, ModelError, WorkerError, shown, why_refused
from helpers.paths import PROJECT, read_text

TEMPLATE_FILE = "chat_template.jinja"
ROLES = ("system", "user", "assistant")
FROM_OUTSIDE = (1, 2, 9, 15)  # signals that end a process for no fault of its own
TIME_LIMIT_S = 20.0  # a busy machine may take seconds to start Python


@dataclass(frozen=True)
class ChatTemplate:
    """source: the template. tokens: what it may name of the tokenizer, such as bos_token, as text."""

    source: str
    tokens: dict[str, str]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as a text that ends where the assistant's answer begins.

        A message is {"role": "system", "user" or "assistant", "content": a text}. Raises InputError for messages that
        are none or that the template refuses, ModelError for a template that cannot be rendered.
        """
        request = {"source": self.source, "tokens": self.tokens, "messages": checked_messages(messages)}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "helpers.model.chat_process"],
                input=json.dumps(request).encode(),
                capture_output=True,
                timeout=TIME_LIMIT_S,
                cwd=PROJECT,  # Python looks there first, and not in the learner's folder
                check=True,
            )
        except OSError as error:
            raise ModelError(
                f"The chat template's process could not be started: {error}.",
                cause=why_refused(error),
                fix="Close other programs, or start Python again.",
            ) from error
        except subprocess.TimeoutExpired:
            raise _no_prompt(f"it was not done after {TIME_LIMIT_S:.0f} s, and was stopped.") from None
        except subprocess.CalledProcessError as error:
            if -error.returncode in FROM_OUTSIDE:
                raise WorkerError(
                    f"The process that renders the chat template was ended by signal {-error.returncode}.",
                    cause="The system has no memory left, or somebody stopped it.",
                    fix="Close other programs, and try again.",
                ) from None
            last = (error.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing."])[-1]
            raise _no_prompt(f"its process ended: {last:.200}") from None
        outcome, text = json.loads(done.stdout.rpartition(b"\n")[2])
        if outcome == "refused":
            raise InputError(
                f"The model's chat template refuses this conversation: {text:.300}",
                cause="Models are trained on certain roles in a certain order; many know no system message.",
                fix="Give user and assistant messages in turn, with the user's first; put a system message's text "
                "before the first user message.",
            )
        if outcome == "failed":
            raise _no_prompt(text)
        return text


def read_chat_template(folder: Path, config: dict[str, Any], tokens: dict[str, str]) -> ChatTemplate | None:
    """The chat template of a checkpoint or engine folder, None where it has none: a file of its own, else an entry of
    tokenizer_config.json, which may hold several by name. Of these, "default" is the one for plain conversations."""
    source = config.get("chat_template")
    if lexists(folder / TEMPLATE_FILE):
        source = read_text(folder / TEMPLATE_FILE)
    if isinstance(source, list):
        source = {template["name"]: template["template"] for template in source}
    if isinstance(source, dict):
        source = source.get("default")
    if source is not None and not isinstance(source, str):
        raise ModelError(
            f"chat_template in tokenizer_config.json of {folder.name!r} is {shown(source)}.",
            cause="It is a text, or a list of texts with names; this one was damaged.",
            fix="Fetch the checkpoint again.",
        )
    return ChatTemplate(source, tokens) if source else None


def checked_messages(messages: Any) -> list[dict[str, str]]:
    """The messages as plain dicts; InputError for whatever else they are."""
    example = 'Give a list such as [{"role": "user", "content": "Hello!"}].'
    if not isinstance(messages, (list, tuple)):
        raise InputError(f"A conversation is a list of messages, not {shown(messages)}.", fix=example)
    if not messages:
        raise InputError("The conversation is empty.", fix=example)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InputError(
                f"Message {number} is not a dict with role and content: {shown(message)}.",
                cause="Tools, names and other fields of chat servers are not supported." if message else "",
                fix=example,
            )
        if message["role"] not in ROLES:
            raise InputError(f"Message {number} has the role {shown(message['role'])}.", fix=f"Use {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            raise InputError(
                f"The content of message {number} is {shown(message['content'])}.", fix="Give it as one text."
            )
    return [{"role": str(message["role"]), "content": str(message["content"])} for message in messages]


def _no_prompt(why: str) -> ModelError:
    return ModelError(
        f"The model's chat template gives no prompt: {why}",
        cause="The template is damaged, written for another program than transformers, or harmful.",
        fix="Compare it with the one on the model's page; or write the prompt yourself, and use generate.",
    )
