"""The batching simulator: requests arrive, and you choose how they are served."""

from __future__ import annotations

from collections.abc import Iterator

from helpers.course import batching
from helpers.course.batching import StepTimes, Timeline
from helpers.course.widgets.panel import Panel, as_html, button, control, row, slider
from helpers.display import Picture
from helpers.errors import need

FRAME = 0.1  # seconds from one picture of a playing simulation to the next


def batching_simulator(times: StepTimes | None = None) -> BatchingSimulator:
    """Controls over `batching.simulate`. times: step times of this machine, beside those of the course's records."""
    if times is not None:
        need(times, StepTimes, batching.STEPS)
    given = {} if times is None else {f"yours: {times.place}": times}
    return BatchingSimulator({**given, **batching.reference_steps()})


class BatchingSimulator(Panel):
    def __init__(self, sources: dict[str, StepTimes]):
        import ipywidgets as w

        super().__init__()
        self.sources = sources
        wide = w.Layout(width="60em", max_width="98%")
        self.source = control("Dropdown", "step times of", options=list(sources), layout=wide)
        self.batching = control("Dropdown", "batching", options=[("in-flight", True), ("static", False)])
        self.cache = control("Dropdown", "KV cache", options=[("paged", True), ("contiguous", False)])
        alone = "100: as many requests as an engine serves that takes them one by one"
        self.load = slider("load, %", 200, 10, 1000, 10, tooltip=alone)
        self.count = slider("requests", 24, 1, 48)
        self.answer = slider("answer, tokens", 48, 1, 64)
        self.batch = slider("max_batch_size", 4, 1, 4)
        self.memory = slider("cache, sequences", 3, 1, 16, tooltip="how many of full length it has room for")
        self.time = slider("time, %", 100, 0, 100)
        self.play = button("Play", "Show the simulation as it goes on", lambda: self._start(self._play()))
        self.table = w.HTML()
        self.shown = [self.output, self.table]
        settings = [self.source, self.batching, self.cache, self.load, self.count, self.answer, self.batch, self.memory]
        self.controls = [*settings, self.play]
        buttons = row(self.play, self.stop_button)
        self.view = w.VBox([row(*settings), row(self.time, buttons), self.errors, self.output, self.table])
        self.draw()  # at once: it sets the largest batch, which the picture for readers depends on
        self.redraw_with(self.draw, *settings)
        self.redraw_with(self.show, self.time)

    def limits(self) -> dict[str, int]:
        return {"max_batch": self.batch.value, "cache_tokens": 320 * self.memory.value, "max_seq_len": 320}

    def requests(self) -> list[batching.Request]:
        times, answer = self.sources[self.source.value], self.answer.value
        alone = 64 * times.prompt_token + answer * times.of_batch(1)  # seconds of a mean request by itself
        return batching.arrivals(self.count.value, self.load.value / 100 / alone, answer=answer)

    def timeline(self) -> Timeline:
        return batching.simulate(
            self.requests(),
            self.sources[self.source.value],
            in_flight=self.batching.value,
            paged=self.cache.value,
            **self.limits(),
        )

    def draw(self) -> None:
        times = self.sources[self.source.value]
        self.batch.max = min(64, max(times.decode))
        self._timeline = self.timeline()
        self.table.value = as_html(batching.compare_batching(self.requests(), times, **self.limits()))
        self.show()

    def show(self) -> None:
        """The picture at the slider's time."""
        end = max(self._timeline.finished)
        name = batching.NAMES[self.batching.value, self.cache.value]
        self.output.value = as_html(batching.batching_picture(self._timeline, name, end * self.time.value / 100))

    def _play(self) -> Iterator[float]:
        for percent in self._until_stopped(iter(range(0, 101, 2))):
            self.time.value = percent
            self.show()
            yield FRAME

    def twin(self) -> Picture:
        return batching.batching_picture(self.timeline(), batching.NAMES[self.batching.value, self.cache.value])
