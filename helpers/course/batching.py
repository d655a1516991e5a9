"""Requests that arrive over time, and how a server deals with them: static or in-flight batching, a contiguous or a
paged KV cache. A simulation: it decides as a scheduler does, and takes each step's time from a measurement.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean

from helpers.bench.records import Record, need_records, references
from helpers.display import COLOURS, Picture, Table, new_panels
from helpers.errors import InputError, need, shown

STEPS = "Give step times: measured_steps(record, 'aot fp32')."  # whoever has a record in their place


@dataclass(frozen=True)
class Request:
    arrival: float  # seconds
    prompt: int  # tokens
    answer: int  # tokens


@dataclass(frozen=True)
class StepTimes:
    """What was measured. A batch runs in the graph of the next larger size, as an engine's does."""

    decode: Mapping[int, float]  # seconds of a decode step, by batch size
    prompt_token: float  # seconds that reading a prompt takes, for each of its tokens
    place: str  # what was measured, and where

    def __post_init__(self) -> None:
        times = [*self.decode.values(), self.prompt_token]
        if not self.decode or min(self.decode) < 1 or min(times) < 0:
            raise InputError(f"These are no step times: {shown(self)}.", fix="Give seconds for each batch size from 1.")

    def of_batch(self, size: int) -> float:
        """Seconds of a step. InputError for more sequences than were measured at once."""
        need(size, int, "Give a number of sequences.")
        if not 1 <= size <= max(self.decode):
            raise InputError(
                f"A batch of {shown(size)} has no step time.",
                fix=f"Give 1 to {max(self.decode)}, or measure larger batches.",
            )
        return self.decode[min(measured for measured in self.decode if measured >= size)]


def measured_steps(record: Record, name: str) -> StepTimes:
    """The step times of one contender of a benchmark, such as "aot fp32": its TPOT, and its TTFT at the smallest batch
    for each token of the prompt."""
    need_records(record)
    decode = {size: row.median("tpot_s") for size in record.batch_sizes if (row := record.find(name, size))}
    first = record.row(name, min(decode, default=1))
    prompt_token = first.median("ttft_s") / record.workload.input_len / first.batch_size
    return StepTimes(decode, prompt_token, f"{record.workload.model}, {name}, {record.place}")


def reference_steps() -> dict[str, StepTimes]:
    """The course's own records: the bundled model on a CPU, and a model of 1.1 billion parameters on a GPU."""
    cpu = next(r for r in references() if r.hardware["device"] == "cpu")
    gpu = max(references(), key=lambda r: len(r.batch_sizes))
    return {s.place: s for s in (measured_steps(cpu, "aot fp32"), measured_steps(gpu, "aot bf16"))}


def arrivals(count: int, per_second: float, *, prompt: int = 64, answer: int = 64, seed: int = 7) -> list[Request]:
    """Requests that come independently of each other, with answers from one token to four times the mean `answer`."""
    if not isinstance(count, int) or answer < 1 or not per_second > 0:
        raise InputError(
            f"{shown(count)} requests, {shown(per_second)} per second, with {shown(answer)} tokens each, are none.",
            fix="Give a whole number of requests, more than 0 per second, and answers of 1 token or more.",
        )
    draw, now, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        requests.append(Request(now, prompt, min(4 * answer, 1 + int(draw.expovariate(1 / answer)))))
        now += draw.expovariate(per_second)
    return requests


@dataclass(frozen=True)
class Step:
    """What went on from `start` to `end`."""

    start: float
    end: float
    batch: int  # sequences that the step worked on
    queue: int  # requests that waited
    held: int  # tokens that the KV cache had room set aside for
    used: int  # tokens that were in it


@dataclass(frozen=True)
class Timeline:
    requests: Sequence[Request]
    steps: list[Step]
    started: list[float]  # when each request joined a batch
    first: list[float]  # when its first token was there
    finished: list[float]

    def mean_seconds(self) -> float:
        """From arrival to last token."""
        return mean(end - r.arrival for r, end in zip(self.requests, self.finished, strict=True))

    def mean_wait(self) -> float:
        """From arrival to first token."""
        return mean(first - r.arrival for r, first in zip(self.requests, self.first, strict=True))

    def tokens_per_second(self) -> float:
        return sum(r.answer for r in self.requests) / (max(self.finished) - min(r.arrival for r in self.requests))

    def filled(self) -> float:
        """Which part of the room that was set aside held tokens, in the mean over time."""
        return sum(s.used * (s.end - s.start) for s in self.steps) / sum(s.held * (s.end - s.start) for s in self.steps)


def simulate(
    requests: Sequence[Request],
    times: StepTimes,
    *,
    max_batch: int,
    cache_tokens: int,
    max_seq_len: int,
    in_flight: bool = True,
    paged: bool = True,
    block: int = 16,
) -> Timeline:
    """Serve the requests in the order of their arrival.

    static      a batch begins when the last one has ended, and ends with its longest answer
    in-flight   whoever waits joins at the next step, and leaves when its answer ends
    contiguous  each sequence has room for max_seq_len tokens from its start
    paged       it takes blocks as it grows. Who may join is decided by the blocks of its whole answer, so that no
                running sequence is ever put out (TensorRT-LLM's policy GUARANTEED_NO_EVICT)

    cache_tokens: what the KV cache holds. A step either reads the prompts of all that join, or decodes one token of
    each. In a static batch the slots of finished sequences go on computing.
    """
    need(times, StepTimes, STEPS)
    times.of_batch(max_batch)
    if not requests or max(r.prompt + r.answer for r in requests) > max_seq_len or min(r.answer for r in requests) < 1:
        raise InputError(
            f"These requests do not fit max_seq_len={max_seq_len}, or there are none.",
            fix="Give prompts and answers (of 1 token or more) that fit together, or a larger max_seq_len.",
        )
    if block < 1 or max_seq_len % block or cache_tokens < max_seq_len:
        raise InputError(
            f"A KV cache of {cache_tokens} tokens cannot serve sequences of {max_seq_len} in blocks of {block}.",
            fix="Give cache_tokens of at least max_seq_len, which is a multiple of the block.",
        )

    def room(tokens: int) -> int:
        return -(-tokens // block) * block if paged else max_seq_len

    whole = [room(r.prompt + r.answer) for r in requests]
    waiting = deque(sorted(range(len(requests)), key=lambda i: requests[i].arrival))
    batch: dict[int, int] = {}  # request: tokens of its answer so far
    started, first, finished = ([0.0] * len(requests) for _ in range(3))
    steps: list[Step] = []
    now = 0.0
    while waiting or batch:
        if not batch:
            now = max(now, requests[waiting[0]].arrival)
        joining: list[int] = []
        while (in_flight or not batch) and waiting and requests[waiting[0]].arrival <= now:
            every = [*batch, *joining, waiting[0]]
            if len(every) > max_batch or sum(whole[i] for i in every) > cache_tokens:
                break
            joining.append(waiting.popleft())
            started[joining[-1]] = now
        if joining:
            took = times.prompt_token * sum(requests[i].prompt for i in joining)
            batch |= dict.fromkeys(joining, 0)
        else:
            took = times.of_batch(len(batch))
        grown = [i for i in joining or batch if batch[i] < requests[i].answer]
        for i in grown:
            batch[i] += 1
            finished[i] = now + took  # of the last token so far
            if batch[i] == 1:
                first[i] = now + took
        lengths = [requests[i].prompt + count for i, count in batch.items()]
        queue = sum(requests[i].arrival <= now for i in waiting)
        steps.append(Step(now, now + took, len(joining or batch), queue, sum(map(room, lengths)), sum(lengths)))
        now += took
        done = [i for i, count in batch.items() if count == requests[i].answer]
        if in_flight or len(done) == len(batch):
            for i in done:
                del batch[i]
    return Timeline(requests, steps, started, first, finished)


NAMES = {
    (in_flight, paged): f"{'in-flight' if in_flight else 'static'}, {'paged' if paged else 'contiguous'}"
    for in_flight, paged in product((False, True), repeat=2)
}


def compare_batching(requests: Sequence[Request], times: StepTimes, **limits: int) -> Table:
    """The same requests under each way of batching and of keeping the cache. limits: as `simulate` takes them."""
    rows = []
    for (in_flight, paged), name in NAMES.items():
        t = simulate(requests, times, in_flight=in_flight, paged=paged, **limits)
        waits = (f"{seconds * 1e3:,.1f} ms" for seconds in (t.mean_wait(), t.mean_seconds()))
        largest = max(step.batch for step in t.steps)
        rows.append((name, *waits, f"{t.tokens_per_second():,.0f}", largest, f"{t.filled():.0%}"))
    caption = f"{len(requests)} simulated requests, with the step times of {times.place}"
    columns = ("batching, KV cache", "to first token", "to last token", "tokens/s", "largest batch", "cache filled")
    return Table(caption, columns, rows)


def batching_picture(timeline: Timeline, title: str, until: float | None = None) -> Picture:
    """Who waited and who ran, the batch and its queue, and the KV cache, up to a moment: None shows all."""
    end = max(timeline.finished)
    until = end if until is None else until
    figure, (bars, counts, cache) = new_panels(3, 1, height=5.2, sharex=True, height_ratios=(2.2, 1, 1))
    for y, (r, start, stop) in enumerate(zip(timeline.requests, timeline.started, timeline.finished, strict=True)):
        if r.arrival <= until:
            bars.barh(y, (min(start, until) - r.arrival) * 1e3, 0.5, r.arrival * 1e3, color=COLOURS[1], hatch="////")
        if start <= until:
            bars.barh(y, (min(stop, until) - start) * 1e3, 0.8, start * 1e3, color=COLOURS[0])
    seen = [step for step in timeline.steps if step.start <= until]
    x = [step.start * 1e3 for step in seen] + [min(until, seen[-1].end) * 1e3]
    for axes, lines in ((counts, ("batch", "queue")), (cache, ("held", "used"))):
        for name, colour, style in zip(lines, COLOURS, ("-", "--"), strict=False):
            heights = [getattr(step, name) for step in [*seen, seen[-1]]]
            label = f"{name} in this step" if name == "batch" else name
            axes.plot(x, heights, style, color=colour, drawstyle="steps-post", label=label)
        axes.legend(loc="upper right", frameon=False, ncols=2)
        axes.set_ylim(0, 1.35 * max(1, *(getattr(step, name) for step in timeline.steps for name in lines)))
    bars.set_ylim(len(timeline.requests) - 0.4, -0.6)
    bars.set_title(f"{title}: hatched waits, solid runs", loc="left", fontsize="medium")
    bars.set_ylabel("request")
    counts.set_ylabel("sequences")
    cache.set_ylabel("cache, tokens")
    cache.set_xlabel("milliseconds")
    for axes in (bars, counts, cache):
        axes.axvline(until * 1e3, color="black", linewidth=1)
        axes.set_xlim(0, end * 1e3 * 1.02)
    alt = (
        f"{title}, up to {until * 1e3:.0f} of {end * 1e3:.0f} ms: a batch of {seen[-1].batch}, "
        f"{seen[-1].queue} waiting, {seen[-1].held:,} tokens of cache held, {seen[-1].used:,} used. "
        f"Mean time to the first token {timeline.mean_wait() * 1e3:.1f} ms, "
        f"to the last {timeline.mean_seconds() * 1e3:.1f} ms; {timeline.tokens_per_second():,.0f} tokens per second."
    )
    return Picture(figure, alt)
