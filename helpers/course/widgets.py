"""Thin widgets over plain functions: whatever a widget shows, a function here or elsewhere returns without it."""

from __future__ import annotations

import html
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from helpers.errors import CourseError, InputError, shown
from helpers.model.sampling import SamplingParams, next_token_distribution

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.backends.base import Engine

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


def sampling_explorer(engine: Engine, prompt: str = START, **settings: Any) -> SamplingExplorer:
    """Controls for temperature, top_p, length and seed over one engine; Run streams the text.

    settings: where the controls stand at first, as SamplingParams' fields.
    """
    return SamplingExplorer(engine, prompt, SamplingParams(**{"seed": 7, "max_tokens": 40, **settings}))


class SamplingExplorer:
    """The widget. Moving a slider redraws the distribution of the first token; Run draws the text from it."""

    def __init__(self, engine: Engine, prompt: str, sampling: SamplingParams):
        import ipywidgets as w  # type: ignore[import-untyped]

        self.engine = engine
        self._logits: tuple[str, Tensor] | None = None
        wide: dict[str, Any] = {"style": {"description_width": "7em"}, "layout": w.Layout(width="25em")}
        full = {**wide, "layout": w.Layout(width="98%")}
        self.prompt = w.Text(prompt, description="prompt", continuous_update=False, **full)
        self.temperature = w.FloatSlider(
            sampling.temperature, min=0, max=2, step=0.1, description="temperature", continuous_update=False, **wide
        )
        self.top_p = w.FloatSlider(
            sampling.top_p, min=0.05, max=1, step=0.05, description="top_p", continuous_update=False, **wide
        )
        longest = min(128, engine.recipe.max_seq_len - engine.recipe.max_input_len)
        self.max_tokens = w.IntSlider(
            min(sampling.max_tokens, longest), min=1, max=longest, description="max_tokens", **wide
        )
        self.seed = w.BoundedIntText(sampling.seed or 0, min=0, max=2**31 - 1, description="seed", **wide)
        self.pause = w.IntSlider(60, min=0, max=300, step=20, description="pause, ms", **wide)
        if self.sampling() != replace(sampling, max_tokens=self.max_tokens.value):
            raise InputError(
                f"The explorer cannot show {shown(sampling)}.",
                cause="It has controls for temperature to 2, top_p from 0.05, max_tokens and seed to 2**31 - 1 only.",
                fix="Leave other settings to engine.stream.",
            )
        self.button = w.Button(description="Run", button_style="primary", tooltip="Generate with these settings")
        self.text, self.chart, self.messages = w.HTML(), w.HTML(), w.Output()
        self.controls = [self.prompt, self.temperature, self.top_p, self.max_tokens, self.seed, self.pause, self.button]
        left = w.VBox([self.temperature, self.top_p, self.max_tokens])
        right = w.VBox([self.seed, self.pause, self.button])
        self.view = w.VBox([self.prompt, w.HBox([left, right]), self.text, self.chart, self.messages])
        for control in (self.prompt, self.temperature, self.top_p):
            control.observe(lambda _: self._guarded(self.show_first), names="value")
        self.button.on_click(lambda _: self._guarded(self.run))
        self._guarded(self.show_first)

    def sampling(self) -> SamplingParams:
        """What the controls say now."""
        return SamplingParams(
            temperature=round(self.temperature.value, 2),
            top_p=round(self.top_p.value, 2),
            max_tokens=self.max_tokens.value,
            seed=self.seed.value,
        )

    def show_first(self) -> None:
        """The distribution of the token after the prompt; nothing is generated."""
        prompt = self.prompt.value
        if self._logits is None or self._logits[0] != prompt:
            self._logits = (prompt, self.engine.logits(prompt))
        ids = self.engine.tokenize(prompt)
        distribution = next_token_distribution(self._logits[1], self.sampling(), ids)
        self._show_text("")
        self.chart.value = "The token after the prompt:" + bars(candidates(self.engine, distribution, after=ids))

    def run(self) -> None:
        """Generate, showing each choice as it is made."""
        for choice in stream_choices(self.engine, self.prompt.value, self.sampling()):
            self._show_text(choice.text)
            self.chart.value = "The last token was chosen from:" + bars(choice.candidates, choice.chosen)
            time.sleep(self.pause.value / 1000)

    def _show_text(self, answer: str) -> None:
        prompt = f"<span style='opacity:0.65'>{html.escape(self.prompt.value)}</span>"
        self.text.value = f"<p style='max-width:48em;line-height:1.5'>{prompt}<b>{html.escape(answer)}</b></p>"

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run a callback with the controls off. Its errors appear under the widget; Jupyter would swallow them."""
        self.messages.outputs = ()
        for control in self.controls:
            control.disabled = True
        try:
            action()
        except CourseError as error:
            self._show_error(f"{type(error).__name__}: {error}\n")
        except Exception:  # a callback's edge: nobody above would show it
            self._show_error(traceback.format_exc())
        finally:
            for control in self.controls:
                control.disabled = False

    def _show_error(self, words: str) -> None:
        self.text.value = self.chart.value = ""  # what is there belongs to other settings
        self.messages.append_stderr(words)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        """The widget, and a picture of it for readers without a kernel."""
        from helpers.course.pictures import sampled_text

        data, about = sampled_text(self.engine, self.prompt.value, self.sampling())._repr_mimebundle_()
        view = self.view._repr_mimebundle_()["application/vnd.jupyter.widget-view+json"]
        return {**data, "application/vnd.jupyter.widget-view+json": view}, about
