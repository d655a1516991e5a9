"""Tables and pictures of what was built and generated, for the notebooks."""

from __future__ import annotations

import platform
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from helpers.backends.base import need_engine
from helpers.backends.report import EngineReport, need_report, need_reports
from helpers.display import (
    COLOURS,
    Picture,
    Table,
    grouped_bars,
    new_figure,
    new_panels,
    plain,
    sample_bars,
    stacked_bars,
)
from helpers.errors import InputError, need, printable, shown

if TYPE_CHECKING:
    from helpers.backends.base import Engine
    from helpers.model.sampling import SamplingParams


def versions(*packages: str) -> None:
    """Print the versions of Python and of these packages, and the machine: the first thing a notebook shows."""
    from helpers.machine import hardware

    every = {"python": platform.python_version()}
    for name in packages:
        need(name, str, "Give a package's name, such as 'torch'.")
        try:
            every[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            every[name] = "is not installed"
    print(", ".join(f"{name} {version}" for name, version in every.items()))
    print(f"machine: {hardware.describe()}")


# An engine's folder


def files(folder: Path) -> Table:
    """The files of an engine: how large, and what for."""
    need(folder, Path, "Give the engine's folder: build(recipe).")
    paths = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    rows = [(name, f"{size:,}", _purpose(name)) for name, size in paths.items()]
    total = sum(paths.values())
    return Table(f"Engine {folder.name}", ("file", "bytes", "what it is"), [*rows, ("all", f"{total:,}", "")])


def _purpose(name: str) -> str:
    known = {
        "manifest.json": "what it was built from, for which machine, every file's hash",
        "report.json": "operations before fusion, kernels after",
        "weights.safetensors": "the weights, in the order the kernels read them",
        "model.json": "the model's shape, and which tokens end a text",
        "tensorrt_llm/config.json": "TensorRT-LLM's own: its version, the model, the build settings",
        "tensorrt_llm/rank0.engine": "TensorRT's plan, with the weights in it",
        "tokenizer.json": "text to token ids and back",
        "tokenizer_config.json": "settings of the tokenizer",
        "special_tokens_map.json": "tokens that are no text",
        "added_tokens.json": "tokens that were added later",
        "chat_template.jinja": "a conversation to one prompt",
    }
    batch = name.partition(".")[0].rpartition("_b")[2]
    part = ", what follows the layers" if name.endswith(".end.pt2") else ""
    phase = "reading a prompt" if name.startswith("prefill") else f"one step of decoding, batch of up to {batch}"
    return known.get(name, f"compiled code: {phase}{part}" if name.endswith(".pt2") else "")


def part_sizes(report: EngineReport) -> dict[str, int]:
    """Bytes of an engine by what they are for."""
    parts = {"weights": 0, "compiled code": 0, "the rest": 0}
    for name, size in report.sizes.items():
        key = "weights" if name == "weights.safetensors" else "the rest"
        parts["compiled code" if name.endswith((".pt2", ".plan", ".engine")) else key] += size
    return parts


def sizes(reports: Mapping[str, EngineReport]) -> Picture:
    """Bytes of several engines, part by part."""
    need_reports(reports)
    each = [part_sizes(report) for report in reports.values()]
    parts = {part: [sizes[part] / 1e6 for sizes in each] for part in each[0]}
    words = "; ".join(f"{name} {sum(s.values()) / 1e6:.1f} MB" for name, s in zip(reports, each, strict=True))
    return Picture(stacked_bars(list(reports), parts, "MB on disk"), f"Bars: size of each engine on disk. {words}.")


def phases(seconds: Mapping[str, float], title: str = "Seconds of each phase of the build") -> Picture:
    """How long each phase of a build took, from the manifest's `seconds`."""
    if not isinstance(seconds, Mapping) or not all(isinstance(took, (int, float)) for took in seconds.values()):
        raise InputError(f"No seconds of phases: {shown(seconds)}.", fix="Give read_manifest(folder)['seconds'].")
    figure, axes = new_figure(height=0.6 + 0.27 * len(seconds))
    bars = axes.barh(list(map(plain, seconds)), list(seconds.values()), color=COLOURS[0])
    axes.bar_label(bars, fmt=" %.1f")
    axes.invert_yaxis()
    axes.set_xlim(0, max(seconds.values()) * 1.12)
    axes.set_title(plain(title), loc="left", fontsize="medium")
    axes.set_xlabel("seconds")
    longest = sorted(seconds.items(), key=lambda item: -item[1])[:3]
    words = ", ".join(f"{name} {took:.1f} s" for name, took in longest)
    return Picture(figure, f"Bars: {title.lower()}. Longest: {words}; total {sum(seconds.values()):.1f} s.")


# Before fusion and after it


def fusion(reports: Mapping[str, EngineReport]) -> Picture:
    """Operations before fusion beside kernels after it, one pair of bars for each report."""
    need_reports(reports)
    each = reports.values()
    counts = {"operations before": [len(r.operations) for r in each], "kernels after": [len(r.kernels) for r in each]}
    words = [f"{name}: {len(r.operations)} operations, {len(r.kernels)} kernels" for name, r in reports.items()]
    alt = f"Pairs of bars: operations before fusion and kernels after it. {'; '.join(words)}."
    return Picture(grouped_bars(list(reports), counts, "count"), alt)


def operations(report: EngineReport, first: int = 0, count: int = 20) -> Table:
    """Some operations as they were before fusion."""
    _need_part(report, first, count)
    part = report.operations[first : first + count]
    rows = [(number, o.op, o.name, _shape(o.shape), o.dtype) for number, o in enumerate(part, start=first + 1)]
    caption = f"Operations {first + 1} to {first + len(part)} of {len(report.operations)}, before fusion"
    return Table(caption, ("number", "kind", "name", "result", "type"), rows)


def _need_part(report: Any, first: Any, count: Any) -> None:
    need_report(report)
    for number in (first, count):
        need(number, int, "Give the first, counted from 0, and how many. Of one graph: report.of('decode_b1').")


def _shape(shape: Sequence[int | str]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def kernels(report: EngineReport, first: int = 0, count: int = 10) -> Table:
    """Some kernels in the order they run, each with the operations that it does in one go."""
    _need_part(report, first, count)
    kinds = {operation.name: operation.op for operation in report.operations}
    rows = [
        (number, kernel.kind, len(kernel.fused), _listed(kinds.get(name, name) for name in kernel.fused))
        for number, kernel in enumerate(report.kernels[first : first + count], start=first + 1)
    ]
    graph = " and ".join(report.graphs())
    caption = f"Kernels {rows[0][0]} to {rows[-1][0]} of {len(report.kernels)} in {graph}" if rows else "No kernels"
    return Table(caption, ("kernel", "made by", "operations", "which"), rows)


def _listed(names: Any) -> str:
    counts = Counter(name.strip("_") for name in names)
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in sorted(counts.items()))


# Times


def timings(samples: Mapping[str, Sequence[float]], what: str = "milliseconds per token") -> Picture:
    """Medians of repeated timings as bars, every sample as a dot. samples are in seconds; the picture is in ms."""
    rows = list(samples.values()) if isinstance(samples, Mapping) else []
    if not rows or not all(hasattr(values, "__len__") and len(values) for values in rows):
        fix = "Give what take_turns measured: all samples of each, by name, and no medians."
        raise InputError(f"These are no times: {shown(samples)}.", fix=fix)
    each = {name: [value * 1e3 for value in values] for name, values in samples.items()}
    words = "; ".join(f"{name} {median(values):.2f} (least {min(values):.2f})" for name, values in each.items())
    runs = len(next(iter(samples.values())))
    return Picture(sample_bars(each, what), f"Bars: {what}, median of {runs} runs. {words}.")


def show_text(text: str, width: int = 100) -> None:
    """Print a generated text, wrapped, without what could steer a terminal."""
    need(text, str, "Give the text of an answer: answer.text.")
    print(textwrap.fill(printable(text.strip()), width))


# The choice of the next token


def distributions(engine: Engine, prompt: str, settings: Mapping[str, SamplingParams], count: int = 8) -> Picture:
    """What the token after the prompt would be drawn from, once for each of several settings."""
    from helpers.model.sampling import next_token_distribution

    need_engine(engine)
    need(settings, Mapping, "Give each setting with a name: {'greedy': SamplingParams(temperature=0)}.")
    logits, ids = engine.logits(prompt), engine.tokenize(prompt)
    order = logits.topk(count).indices.tolist()  # the same tokens in every panel, so that they compare
    labels = [_label(engine.detokenize([token], ids)) for token in order]
    figure, panels = new_panels(1, len(settings), height=2.6)
    words = []
    for axes, (name, params) in zip(panels, settings.items(), strict=True):
        values = next_token_distribution(logits, params, ids)[order].tolist()
        bars = axes.barh(range(count), values, color=COLOURS[0])
        axes.bar_label(bars, [f"{value:.2f}" if value else "-" for value in values], padding=2, fontsize="small")
        axes.set_yticks(range(count), [plain(label) for label in labels])
        axes.label_outer()
        axes.set_title(plain(name), fontsize="medium")
        axes.set_xlim(0, 1.25)
        axes.set_xticks([0, 0.5, 1])
        axes.invert_yaxis()
        likely = ", ".join(f"{label} {value:.2f}" for label, value in zip(labels[:3], values[:3], strict=True))
        words.append(f"{name}: {likely}")
    figure.supxlabel("probability", fontsize="medium")
    return Picture(figure, f"Bars: probability of the {count} likeliest next tokens. {'; '.join(words)}.")


def _label(token: str) -> str:
    """A token's text beside its bar."""
    return printable(token.strip()) or (repr(token) if token else "(end)")


def sampled_text(engine: Engine, prompt: str, sampling: SamplingParams) -> Picture:
    """A text drawn with these settings, over the distribution of its first token: a widget's picture for the web."""
    name = f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, seed {sampling.seed}"
    text = printable(prompt + engine.generate(prompt, sampling)[0].text)
    picture = distributions(engine, prompt, {f"the token after the prompt ({name})": sampling})
    picture.figure.suptitle(plain(textwrap.fill(text, 92)), x=0.01, ha="left", fontsize="medium")
    picture.figure.set_size_inches(7.5, 3.6)
    return Picture(picture.figure, f"Text: {text} {picture.alt}")
