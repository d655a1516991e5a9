"""Thin widgets over plain functions: whatever a widget shows, a function here or elsewhere returns without it."""

from __future__ import annotations

import asyncio
import contextlib
import html
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from helpers.errors import CourseError, InputError, printable, shown
from helpers.model.sampling import SamplingParams, checked, next_token_distribution

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.backends.base import Engine

T = TypeVar("T")
START = "Once upon a time, there was a little girl named Mia. She lived in a small house by the river. She had a"


@dataclass(frozen=True)
class Choice:
    """One token of an answer, with what it was chosen from."""

    text: str  # the answer so far, this token included
    chosen: str
    candidates: list[tuple[str, float]]  # the likeliest tokens, and the chosen one, with their probabilities


def candidates(
    engine: Engine, probabilities: Tensor, count: int = 8, after: Sequence[int] = ()
) -> list[tuple[str, float]]:
    """The `count` likeliest tokens of a distribution [V], likeliest first, as text that follows the tokens `after`."""
    if type(count) is not int or count < 1:
        raise InputError(f"The number of candidates is {shown(count)}.", fix="Give 1 or more.")
    top = probabilities.topk(min(count, len(probabilities)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [(engine.detokenize([token], after), probability) for token, probability in pairs]


def next_tokens(engine: Engine, prompt: str, sampling: SamplingParams, count: int = 8) -> list[tuple[str, float]]:
    """What the token after the prompt would be drawn from, under these settings."""
    ids = engine.tokenize(prompt)
    return candidates(engine, next_token_distribution(engine.logits(prompt), sampling, ids), count, ids)


def stream_choices(engine: Engine, prompt: str, sampling: SamplingParams, count: int = 8) -> Iterator[Choice]:
    """`engine.stream`, showing for each token what it was chosen from."""
    seen: deque[Tensor] = deque()  # logits [V] of the tokens that were chosen and not handed out yet

    def keep(logits: Tensor) -> None:
        seen.append(logits[0].cpu().float().clone())  # the engine writes the next step's into the same memory

    before = engine.tokenize(prompt)
    text = ""
    for token in engine.stream(prompt, sampling, observe=keep):
        distribution = next_token_distribution(seen.popleft(), sampling, before)  # [V]
        options = candidates(engine, distribution, count, before)
        chosen = engine.detokenize([token.token_id], before)
        if chosen not in dict(options):  # an unlikely one was drawn
            options.append((chosen, distribution[token.token_id].item()))
        before.append(token.token_id)
        text += token.text
        yield Choice(text, chosen, options)


def bars(options: list[tuple[str, float]], chosen: str | None = None) -> str:
    """A distribution as an HTML table with a bar for each token; the chosen one is marked by an arrow too."""
    rows = []
    for text, probability in options:
        mark, colour = ("&#9654;", "#c44e00") if text == chosen else ("", "#4878a8")
        bar = f"<div style='background:{colour};height:1em;width:{probability * 260:.0f}px'></div>"
        rows.append(
            f"<tr><td>{mark}</td><td style='text-align:right;white-space:pre;font-family:monospace'>"
            f"{html.escape(text) or '(end)'}</td>"
            f"<td style='text-align:right'>{probability:6.1%}</td><td>{bar}</td></tr>"
        )
    return f"<table style='line-height:1.3;border-spacing:6px 0'>{''.join(rows)}</table>"


class Panel(ABC):
    """What the widgets share: settings, a Stop button, and a place for errors, which Jupyter would swallow.

    An answer comes in steps, and between two of them the kernel serves clicks. So Stop works, and what else is clicked
    meanwhile is ignored instead of waiting for its turn.
    """

    view: Any  # the whole widget

    def __init__(self, engine: Engine, sampling: SamplingParams, most_tokens: int):
        import ipywidgets as w  # type: ignore[import-untyped]

        self.engine = engine
        self.wide: dict[str, Any] = {"style": {"description_width": "7em"}, "layout": w.Layout(width="25em")}
        self.full = {**self.wide, "layout": w.Layout(width="98%")}
        self.temperature = w.FloatSlider(
            sampling.temperature,
            min=0,
            max=2,
            step=0.1,
            description="temperature",
            continuous_update=False,
            **self.wide,
        )
        longest = min(most_tokens, engine.recipe.max_seq_len - engine.recipe.max_input_len)
        self.max_tokens = w.IntSlider(
            min(sampling.max_tokens, longest), min=1, max=longest, description="max_tokens", **self.wide
        )
        self.stop_button = w.Button(description="Stop", tooltip="End this answer", disabled=True)
        self.stop_button.on_click(lambda _: self.stop())
        self.errors = w.Output()
        self.controls: list[Any] = [self.temperature, self.max_tokens]  # off while an answer comes
        self.task: asyncio.Task[None] | None = None  # of the answer that comes; Python forgets one that nobody keeps
        self._running = self._stopping = False

    @abstractmethod
    def static(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What readers without a kernel see: data by media type, and metadata."""

    @abstractmethod
    def sampling(self) -> SamplingParams:
        """What the controls say now."""

    def _check_shown(self, sampling: SamplingParams) -> None:
        """InputError for settings that no control can show. An engine's limits may make the answer shorter."""
        if self.sampling() != replace(sampling, max_tokens=self.max_tokens.value):
            raise InputError(
                f"This widget cannot show {shown(sampling)}.",
                cause="Its controls go up to temperature 2 and seed 2**31 - 1, and from top_p 0.05; and the sampling "
                "explorer has no others.",
                fix="Leave other settings to engine.stream.",
            )

    def stop(self) -> None:
        self._stopping = True

    def _start(self, steps: Iterator[float]) -> None:
        """Take the steps of an answer; each says how many seconds to wait after it. A notebook gets its cell back."""
        if self._running:
            return
        self._switch(running=True)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no notebook
            asyncio.run(self._take(steps))
        else:
            self.task = loop.create_task(self._take(steps))

    async def _take(self, steps: Iterator[float]) -> None:
        try:
            with self._shown_errors():
                for seconds in steps:
                    await asyncio.sleep(seconds)
        finally:
            self._switch(running=False)

    def _until_stopped(self, items: Iterator[T]) -> Iterator[T]:
        for item in items:
            yield item
            if self._stopping:
                return

    def _switch(self, running: bool) -> None:
        self._running, self._stopping = running, False
        self.stop_button.disabled = not running
        for control in self.controls:
            control.disabled = running

    @contextlib.contextmanager
    def _shown_errors(self) -> Iterator[None]:
        """What goes wrong in here is told under the widget."""
        self.errors.outputs = ()
        try:
            yield
        except CourseError as error:
            self._show_error(f"{type(error).__name__}: {error}\n")
        except Exception:  # a callback's edge: nobody above would show it
            self._show_error(traceback.format_exc())

    def _show_error(self, words: str) -> None:
        self.errors.append_stderr(words)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        data, about = self.static()
        view = self.view._repr_mimebundle_()["application/vnd.jupyter.widget-view+json"]
        return {**data, "application/vnd.jupyter.widget-view+json": view}, about


def sampling_explorer(engine: Engine, prompt: str = START, **settings: Any) -> SamplingExplorer:
    """Controls for temperature, top_p, length and seed over one engine; Run streams the text.

    settings: where the controls stand at first, as SamplingParams' fields.
    """
    return SamplingExplorer(engine, prompt, SamplingParams(**{"seed": 7, "max_tokens": 40, **settings}))


class SamplingExplorer(Panel):
    """The widget. Moving a slider redraws the distribution of the first token; Run draws the text from it."""

    def __init__(self, engine: Engine, prompt: str, sampling: SamplingParams):
        import ipywidgets as w

        super().__init__(engine, sampling, most_tokens=128)
        self._logits: tuple[str, Tensor] | None = None
        self.prompt = w.Text(prompt, description="prompt", continuous_update=False, **self.full)
        self.top_p = w.FloatSlider(
            sampling.top_p, min=0.05, max=1, step=0.05, description="top_p", continuous_update=False, **self.wide
        )
        self.seed = w.BoundedIntText(sampling.seed or 0, min=0, max=2**31 - 1, description="seed", **self.wide)
        self.pause = w.IntSlider(60, min=0, max=300, step=20, description="pause, ms", **self.wide)
        self._check_shown(sampling)
        self.button = w.Button(description="Run", button_style="primary", tooltip="Generate with these settings")
        self.text, self.chart = w.HTML(), w.HTML()
        self.controls += [self.prompt, self.top_p, self.seed, self.pause, self.button]
        left = w.VBox([self.temperature, self.top_p, self.max_tokens])
        right = w.VBox([self.seed, self.pause, w.HBox([self.button, self.stop_button])])
        self.view = w.VBox([self.prompt, w.HBox([left, right]), self.text, self.chart, self.errors])
        for control in (self.prompt, self.temperature, self.top_p):
            control.observe(lambda _: self.show_first(), names="value")
        self.button.on_click(lambda _: self._start(self._run()))
        self.show_first()

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            temperature=round(self.temperature.value, 2),
            top_p=round(self.top_p.value, 2),
            max_tokens=self.max_tokens.value,
            seed=self.seed.value,
        )

    def show_first(self) -> None:
        """The distribution of the token after the prompt; nothing is generated."""
        if self._running:
            return
        with self._shown_errors():
            prompt = self.prompt.value
            if self._logits is None or self._logits[0] != prompt:
                self._logits = (prompt, self.engine.logits(prompt))
            ids = self.engine.tokenize(prompt)
            distribution = next_token_distribution(self._logits[1], self.sampling(), ids)
            self._show_text("")
            self.chart.value = "The token after the prompt:" + bars(candidates(self.engine, distribution, after=ids))

    def _run(self) -> Iterator[float]:
        """Generate, showing each choice as it is made."""
        choices = stream_choices(self.engine, self.prompt.value, self.sampling())
        for choice in self._until_stopped(choices):
            self._show_text(choice.text)
            self.chart.value = "The last token was chosen from:" + bars(choice.candidates, choice.chosen)
            yield self.pause.value / 1000

    def _show_text(self, answer: str) -> None:
        prompt = f"<span style='opacity:0.65'>{html.escape(self.prompt.value)}</span>"
        self.text.value = f"<p style='max-width:48em;line-height:1.5'>{prompt}<b>{html.escape(answer)}</b></p>"

    def _show_error(self, words: str) -> None:
        self.text.value = self.chart.value = ""  # what is there belongs to other settings
        super()._show_error(words)

    def static(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from helpers.course.pictures import sampled_text

        return sampled_text(self.engine, self.prompt.value, self.sampling())._repr_mimebundle_()


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

        super().__init__(engine, sampling, most_tokens=1024)
        self._sampling, self._first = sampling, [{"role": "system", "content": system}] if system else []
        self._check_shown(sampling)
        engine.tokenize_chat([*self._first, {"role": "user", "content": "Hello!"}])  # refused here if it cannot be
        self.question = w.Text(description="message", placeholder="Write, then press Enter", **self.full)
        self.question.on_msg(lambda _, content, __: self.send() if content.get("event") == "submit" else None)
        self.button = w.Button(description="Send", button_style="primary", tooltip="Send the message")
        self.button.on_click(lambda _: self.send())
        self.anew = w.Button(description="New conversation", tooltip="Forget what was said")
        self.anew.on_click(lambda _: self.begin_anew())
        self.text = w.HTML()
        self.controls += [self.button, self.anew]
        buttons = w.HBox([self.button, self.stop_button, self.anew])
        settings = w.HBox([self.temperature, self.max_tokens])
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
            self.text.value = as_html(self.messages)

    def _send(self) -> Iterator[float]:
        yield 0.2  # JupyterLab tells of Enter at once, and of the last letters a little later
        question = self.question.value
        if question.strip():
            self.question.value = ""
            try:
                yield from self._answer(question)
            except Exception:
                self.question.value, self.text.value = question, as_html(self.messages)  # as before it was sent
                raise

    def _answer(self, question: str) -> Iterator[float]:
        messages = [*self.messages, {"role": "user", "content": question}]
        answer = ""
        self.text.value = as_html(messages, "...")
        for token in self._until_stopped(self.engine.stream_chat(messages, self.sampling())):
            answer += token.text
            self.text.value = as_html(messages, answer)
            yield 0
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.text.value = as_html(self.messages)

    def static(self) -> tuple[dict[str, Any], dict[str, Any]]:
        text = "\n".join(f"{message['role']}: {printable(message['content'])}" for message in self.messages)
        return {"text/html": as_html(self.messages), "text/plain": text or "(A conversation that has not begun.)"}, {}


def as_html(messages: Sequence[dict[str, str]], answer: str | None = None) -> str:
    """A conversation, and the part of its next answer that is there, as a page shows it."""
    every = [*messages, {"role": "assistant", "content": answer}] if answer is not None else messages
    lines = "".join(
        f"<p style='max-width:48em;line-height:1.5;white-space:pre-wrap'><b>{html.escape(message['role'])}:</b> "
        f"{html.escape(message['content'] or '')}</p>"
        for message in every
    )
    return f"<section aria-label='conversation'>{lines or '<p>The conversation has not begun.</p>'}</section>"
