"""The sampling explorer: move a setting and see the distribution follow; run it, and open any token of the text."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from helpers.backends.base import need_engine
from helpers.course.pictures import sampled_text
from helpers.course.widgets.choices import START, Choice, bars, candidates, stream_choices, visible
from helpers.course.widgets.panel import Panel, button, control, row, slider
from helpers.display import Picture
from helpers.errors import InputError, need, shown
from helpers.model.sampling import SamplingParams, checked, next_token_distribution

if TYPE_CHECKING:
    from torch import Tensor

    from helpers.backends.base import Engine


def sampling_explorer(
    engine: Engine, prompt: str = START, *, beside: SamplingParams | None = None, **settings: Any
) -> SamplingExplorer:
    """Controls for temperature, top_p, length and seed over one engine; Run streams the text.

    settings: where the controls stand at first, as SamplingParams' fields. beside: other settings, whose temperature
    and top_p stand beside the first; without it, a box of the widget brings them.
    """
    return SamplingExplorer(engine, prompt, SamplingParams(**{"seed": 7, "max_tokens": 40, **settings}), beside)


def check_shown(shown_now: SamplingParams, asked: SamplingParams) -> None:
    """InputError for settings that no control can show. An engine's limits may make the answer shorter."""
    if shown_now != replace(asked, max_tokens=shown_now.max_tokens):
        raise InputError(
            f"This widget cannot show {shown(asked)}.",
            cause="Its controls go up to temperature 2 and seed 2**31 - 1, and from top_p 0.05; and the sampling "
            "explorer has no others, and one seed for both sides.",
            fix="Leave other settings to engine.stream.",
        )


class Side:
    """One setting of temperature and top_p, the text that it gave, and what a token of it was chosen from."""

    def __init__(self, name: str, sampling: SamplingParams):
        import ipywidgets as w

        self.temperature = slider(f"temperature{name}", sampling.temperature, 0.0, 2.0, 0.1)
        self.top_p = slider(f"top_p{name}", sampling.top_p, 0.05, 1.0, 0.05)
        self.text, self.chart = w.HTML(), w.HTML()
        # One button a token: click it, or go through them with the arrow keys.
        self.tokens = control("ToggleButtons", f"tokens{name}", options=[], layout=w.Layout(max_width="98%"))
        self.tokens.style.button_width = "auto"
        self.tokens.observe(lambda _: self.open(), names="index")
        self.choices: list[Choice] = []
        parts = [self.temperature, self.top_p, self.text, self.tokens, self.chart]
        self.view = w.VBox(parts, layout=w.Layout(flex="1 1 24em", padding="0 1em 0 0"))
        self.clear()

    def clear(self) -> None:
        self.choices = []
        self.tokens.options, self.tokens.layout.display = [], "none"
        self.text.value = self.chart.value = ""

    def list_tokens(self) -> None:
        """Once the text is whole: each token can be opened."""
        self.tokens.options = [(visible(choice.chosen), at) for at, choice in enumerate(self.choices)]
        if self.choices:
            self.tokens.layout.display, self.tokens.index = "", len(self.choices) - 1

    def open(self) -> None:
        at = self.tokens.index
        if at is not None and at < len(self.choices):
            self.show_choice(self.choices[at], f"Token {at + 1} was chosen from:")

    def show_choice(self, choice: Choice, title: str) -> None:
        self.chart.value = title + bars(choice.candidates, choice.chosen)

    def show_text(self, prompt: str, answer: str) -> None:
        before = f"<span style='opacity:0.65'>{html.escape(prompt)}</span>"
        self.text.value = f"<p style='max-width:48em;line-height:1.5'>{before}<b>{html.escape(answer)}</b></p>"


class SamplingExplorer(Panel):
    """The widget. Moving a slider redraws the distribution of the first token; Run draws the text from it."""

    def __init__(self, engine: Engine, prompt: str, sampling: SamplingParams, beside: SamplingParams | None):
        import ipywidgets as w

        super().__init__()
        need_engine(engine)
        need(prompt, str, "Give the prompt as text.")
        if beside is not None:
            beside = replace(beside, seed=sampling.seed) if checked(beside).seed is None else beside
        self.engine = engine
        self._logits: tuple[str, Tensor] | None = None
        longest = min(128, engine.recipe.max_seq_len - engine.recipe.max_input_len)
        wide = w.Layout(width="98%")
        self.prompt = control("Text", "prompt", value=prompt, continuous_update=False, layout=wide)
        self.max_tokens = slider("max_tokens", min(sampling.max_tokens, longest), 1, longest)
        self.seed = control("BoundedIntText", "seed", value=sampling.seed or 0, min=0, max=2**31 - 1)
        self.pause = slider("pause, ms", 60, 0, 300, 20)
        self.two = control("Checkbox", "two settings side by side", value=beside is not None, indent=False)
        self.sides = [Side("", sampling), Side(" (2)", beside or replace(sampling, temperature=0.0))]
        check_shown(self.sampling(), sampling)
        if beside is not None:
            check_shown(self.sampling(1), beside)
        self.button = button("Run", "Generate with these settings", lambda: self._start(self._run()))
        self.button.button_style = "primary"
        sliders = [part for side in self.sides for part in (side.temperature, side.top_p)]
        common = [self.max_tokens, self.seed, self.pause, self.two]
        self.controls = [self.prompt, *sliders, *common, self.button]
        sides = row(*(side.view for side in self.sides))
        self.view = w.VBox([self.prompt, row(*common), row(self.button, self.stop_button), self.errors, sides])
        self.redraw_with(self.show_first, self.prompt, self.two, *sliders)

    def sampling(self, side: int = 0) -> SamplingParams:
        return SamplingParams(
            temperature=round(self.sides[side].temperature.value, 2),
            top_p=round(self.sides[side].top_p.value, 2),
            max_tokens=self.max_tokens.value,
            seed=self.seed.value,
        )

    def _shown_sides(self) -> list[tuple[Side, SamplingParams]]:
        self.sides[1].view.layout.display = "" if self.two.value else "none"
        return [(side, self.sampling(at)) for at, side in enumerate(self.sides) if at == 0 or self.two.value]

    def show_first(self) -> None:
        """The distribution of the token after the prompt; nothing is generated."""
        prompt = self.prompt.value
        if self._logits is None or self._logits[0] != prompt:
            self._logits = (prompt, self.engine.logits(prompt))
        ids, logits = self.engine.tokenize(prompt), self._logits[1]
        for side, sampling in self._shown_sides():
            distribution = next_token_distribution(logits, sampling, ids)
            side.clear()
            side.show_text(prompt, "")
            options = candidates(self.engine, distribution, after=ids, logits=logits)
            side.chart.value = "The token after the prompt:" + bars(options)

    def _run(self) -> Iterator[float]:
        """Generate, showing each choice as it is made; one side after the other, since an engine has one KV cache."""
        for side, sampling in self._shown_sides():
            side.clear()
            try:
                for choice in self._until_stopped(stream_choices(self.engine, self.prompt.value, sampling)):
                    side.choices.append(choice)
                    side.show_text(self.prompt.value, choice.text)
                    side.show_choice(choice, "The last token was chosen from:")
                    yield self.pause.value / 1000
            finally:
                side.list_tokens()
            if self._stopping:
                return

    def _show_error(self, words: str) -> None:
        for side in self.sides:  # what is there belongs to other settings
            side.clear()
        super()._show_error(words)

    def twin(self) -> Picture:
        return sampled_text(self.engine, self.prompt.value, self.sampling())
