"""What all widgets share: labelled controls, steps that can be stopped, pictures that keep up, and errors in sight."""

from __future__ import annotations

import asyncio
import contextlib
import html
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from helpers.display import Table
from helpers.errors import CourseError

T = TypeVar("T")
REDRAW = 0.03  # seconds that a redraw waits for more moves of the same drag
_shown: dict[str, tuple[str, list[Panel]]] = {}  # a cell's last run, and the panels that it showed


def control(kind: str, label: str, **settings: Any) -> Any:
    """A control of ipywidgets with its label beside it; on a phone it is as wide as the page."""
    import ipywidgets as w

    layout = w.Layout(width="26em", max_width="98%")
    return getattr(w, kind)(
        description=label,
        **{"style": {"description_width": "10em"}, "layout": layout} | settings,
    )


def slider(label: str, value: float, low: float, high: float, step: float = 1, **settings: Any) -> Any:
    """A slider of whole numbers, or of others where its step is none."""
    kind = "IntSlider" if isinstance(step, int) else "FloatSlider"
    return control(kind, label, value=value, min=low, max=high, step=step, **settings)


def button(label: str, tooltip: str, click: Callable[[], None], **settings: Any) -> Any:
    import ipywidgets as w

    made = w.Button(description=label, tooltip=tooltip, **settings)
    made.on_click(lambda _: click())
    return made


def row(*parts: Any) -> Any:
    """Side by side where there is room, else one below the other."""
    import ipywidgets as w

    return w.HBox(parts, layout=w.Layout(flex_flow="row wrap"))


def mime_bundle(thing: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A table, a picture or a text as a notebook shows it: data by media type, and metadata."""
    if hasattr(thing, "_repr_mimebundle_"):
        return thing._repr_mimebundle_()
    text = str(thing)
    lines = f"<div style='white-space:pre-wrap'>{html.escape(text)}</div>"
    page = thing._repr_html_() if hasattr(thing, "_repr_html_") else lines
    return {"text/html": page, "text/plain": text}, {}


def as_html(thing: Any) -> str:
    """The same as a part of a page."""
    above = ""
    if isinstance(thing, Table):  # on a phone the table scrolls, and its caption has to be read without that
        above, thing = f"<p>{html.escape(thing.caption)}</p>", replace(thing, caption="")
    data, _ = mime_bundle(thing)
    if "image/png" in data:
        alt = html.escape(data["text/plain"], quote=True)
        style = "style='max-width:100%;min-width:32em'"  # a phone scrolls what it could not make legible
        image = f"<img alt='{alt}' {style} src='data:image/png;base64,{data['image/png']}'>"
        return f"<div style='width:0;min-width:100%;overflow-x:auto'>{image}</div>"
    table = f"<div class='jp-RenderedHTMLCommon' style='overflow-x:auto'>{data['text/html']}</div>"
    # As wide as the page, and not as the table.
    return f"<div style='width:0;min-width:100%;line-height:1.4'>{above}{table}</div>"


class Panel(ABC):
    """Settings, a Stop button, and a place for errors, which Jupyter would swallow.

    Work comes in steps, and between two of them the kernel serves clicks. So Stop works, and what else is clicked
    meanwhile is ignored instead of waiting for its turn.
    """

    view: Any  # the whole widget
    engine: Any = None  # where it answers with one

    def __init__(self) -> None:
        import ipywidgets as w

        self.output = w.HTML()  # what `draw` shows
        self.shown = [self.output]  # what belongs to the settings: an error empties it
        self.stop_button = button("Stop", "End what is running", self.stop, disabled=True)
        self.errors = w.Output()
        self.controls: list[Any] = []  # off while it runs
        self.task: asyncio.Task[None] | None = None  # of what runs; Python forgets one that nobody keeps
        self._running = self._stopping = False
        self._due: set[Callable[[], None]] = set()  # what will be drawn in a moment

    @abstractmethod
    def twin(self) -> Any:
        """What readers without a kernel see: a table, a picture or a text."""

    def draw(self) -> None:
        self.output.value = as_html(self.twin())

    def stop(self) -> None:
        self._stopping = self.stop_button.disabled = True  # to be seen at once: the step that runs may take long
        self.stop_button.description = "Stopping"

    def redraw_with(self, draw: Callable[[], None], *controls: Any) -> None:
        """Draw now, and whenever one of the controls moves. A fast drag is drawn as it is then: no move waits for its
        turn."""
        for one in controls:
            one.observe(lambda _: self._soon(draw), names="value")
        self._soon(draw)

    def _soon(self, draw: Callable[[], None]) -> None:
        def now() -> None:
            self._due.discard(draw)
            if not self._running:
                with self._shown_errors():
                    draw()

        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no notebook
            now()
        else:
            if draw not in self._due:
                self._due.add(draw)
                loop.call_later(REDRAW, now)

    def _start(self, steps: Iterator[float]) -> None:
        """Take the steps of some work; each says how many seconds to wait after it. A notebook gets its cell back."""
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
        self.stop_button.disabled, self.stop_button.description = not running, "Stop"
        for one in self.controls:
            one.disabled = running

    @contextlib.contextmanager
    def _shown_errors(self) -> Iterator[None]:
        """What goes wrong in here is told in the widget."""
        self.errors.outputs = ()
        try:
            yield
        except CourseError as error:
            self._show_error(f"{type(error).__name__}: {error}\n")
        except Exception:  # a callback's edge: nobody above would show it
            self._show_error(traceback.format_exc())

    def _show_error(self, words: str) -> None:
        for part in self.shown:
            part.value = ""
        self.errors.append_stderr(words)

    def close(self) -> None:
        """End what runs, and let go of the engine. ipywidgets itself keeps every widget, and IPython what a cell
        returned."""
        self.stop()
        self.engine, parts = None, [self.view]
        for part in parts:  # it grows meanwhile
            parts += getattr(part, "children", ())
            part.close()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        cell, run = _cell_and_run()
        if cell:
            earlier, panels = _shown.get(cell, (run, []))
            if earlier != run:  # the cell runs again: what it showed before is gone from the page
                for panel in panels:
                    if panel is not self:
                        panel.close()
                panels = []
            _shown[cell] = run, [*panels, self]
        data, about = mime_bundle(self.twin())
        view = self.view._repr_mimebundle_()["application/vnd.jupyter.widget-view+json"]
        return {**data, "application/vnd.jupyter.widget-view+json": view}, about


def _cell_and_run() -> tuple[str, str]:
    """What JupyterLab and Notebook call the cell that runs, and this run of it; of another front end, no name."""
    from IPython import get_ipython

    shell = get_ipython()
    asked = shell.get_parent() if hasattr(shell, "get_parent") else {}
    return asked.get("metadata", {}).get("cellId", ""), asked.get("header", {}).get("msg_id", "")
