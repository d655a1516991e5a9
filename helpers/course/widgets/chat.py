"""A conversation with a model that was trained on conversations."""

from __future__ import annotations

import html
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from helpers.backends.base import need_engine
from helpers.course.widgets.panel import Panel, button, control, row, slider
from helpers.course.widgets.sampling import check_shown
from helpers.errors import printable
from helpers.model.sampling import SamplingParams, checked

if TYPE_CHECKING:
    from helpers.backends.base import Engine


def chat(engine: Engine, question: str = "", *, system: str = "", sampling: SamplingParams | None = None) -> Chat:
    """A conversation with an engine whose model has a chat template: write, press Enter or Send, read.

    question: asked at once, so that there is an answer to see. system: what the model is told first. sampling: where
    the controls stand at first; what has no control, such as top_p and stop, stays as it is.
    """
    default = SamplingParams(temperature=0.7, max_tokens=256)
    return Chat(engine, question, system, default if sampling is None else checked(sampling))


class Chat(Panel):
    """The widget. `messages` is the conversation so far, as engine.chat takes it."""

    def __init__(self, engine: Engine, question: str, system: str, sampling: SamplingParams):
        import ipywidgets as w

        super().__init__()
        need_engine(engine)
        self.engine = engine
        longest = min(1024, engine.recipe.max_seq_len - engine.recipe.max_input_len)
        self.temperature = slider("temperature", sampling.temperature, 0.0, 2.0, 0.1)
        self.max_tokens = slider("max_tokens", min(sampling.max_tokens, longest), 1, longest)
        self._sampling, self._first = sampling, [{"role": "system", "content": system}] if system else []
        check_shown(self.sampling(), sampling)
        engine.tokenize_chat([*self._first, {"role": "user", "content": "Hello!"}])  # refused here if it cannot be
        wide = w.Layout(width="98%")
        self.question = control("Text", "message", placeholder="Write, then press Enter", layout=wide)
        self.question.on_msg(lambda _, content, __: self.send() if content.get("event") == "submit" else None)
        self.button = button("Send", "Send the message", self.send, button_style="primary")
        self.anew = button("New conversation", "Forget what was said", self.begin_anew)
        self.text, self.shown = self.output, []  # an error leaves what was said
        self.controls = [self.temperature, self.max_tokens, self.button, self.anew]
        buttons, settings = row(self.button, self.stop_button, self.anew), row(self.temperature, self.max_tokens)
        self.view = w.VBox([self.text, self.errors, self.question, buttons, settings])
        self.begin_anew()
        if question:
            with self._shown_errors():
                deque(self._answer(question), maxlen=0)

    def sampling(self) -> SamplingParams:
        temperature = round(self.temperature.value, 2)
        return replace(self._sampling, temperature=temperature, max_tokens=self.max_tokens.value)

    def send(self) -> None:
        """Answer what stands in the field."""
        self._start(self._send())

    def begin_anew(self) -> None:
        if not self._running:
            self.messages, self.errors.outputs = list(self._first), ()
            self.text.value = page_of(self.messages)

    def _send(self) -> Iterator[float]:
        yield 0.2  # JupyterLab tells of Enter at once, and of the last letters a little later
        question = self.question.value
        if question.strip():
            self.question.value = ""
            try:
                yield from self._answer(question)
            except Exception:
                self.question.value, self.text.value = question, page_of(self.messages)  # as before it was sent
                raise

    def _answer(self, question: str) -> Iterator[float]:
        messages = [*self.messages, {"role": "user", "content": question}]
        answer = ""
        self.text.value = page_of(messages, "...")
        for token in self._until_stopped(self.engine.stream_chat(messages, self.sampling())):
            answer += token.text
            self.text.value = page_of(messages, answer)
            yield 0
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.text.value = page_of(self.messages)

    def twin(self) -> str:
        lines = (f"{message['role']}: {printable(message['content'])}" for message in self.messages)
        return "\n".join(lines) or "(A conversation that has not begun.)"


def page_of(messages: Sequence[dict[str, str]], answer: str | None = None) -> str:
    """A conversation, and the part of its next answer that is there, as a page shows it."""
    every = [*messages, {"role": "assistant", "content": answer}] if answer is not None else messages
    lines = "".join(
        f"<p style='max-width:48em;line-height:1.5;white-space:pre-wrap'><b>{html.escape(message['role'])}:</b> "
        f"{html.escape(message['content'] or '')}</p>"
        for message in every
    )
    return f"<section aria-label='conversation'>{lines or '<p>The conversation has not begun.</p>'}</section>"
