"""Notebook 04: compare. All figures come from the records that the notebook froze."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import expect, judge
from helpers.course.values import alone, choice, plain, printed, span, whole, within
from helpers.errors import InputError

if TYPE_CHECKING:
    from helpers.bench.records import Record, Row


def tpot(row: Row) -> float:
    return row.median("tpot_s") * 1e3  # ms


@judge("04.1")
def times_shorter(answer: Any, record: Record) -> str:
    fp32, int8 = tpot(record.row("aot fp32")), tpot(record.row("aot int8"))
    within(answer, span(lambda a, b: a / b, printed(fp32, 2), printed(int8, 2)))
    return f"{fp32:.2f} ms / {int8:.2f} ms = {fp32 / int8:.1f}."


@judge("04.2")
def short_answers(answer: Any, record: Record) -> str:
    row = record.row("aot fp32")
    first, each = row.median("ttft_s") * 1e3, tpot(row)
    right = 8e3 / (first + 7 * each)
    mistakes = {
        "That has 8 TPOTs: the first token comes with the TTFT, and seven follow.": 8e3 / (first + 8 * each),
        "The first of the 8 tokens counts too.": 7e3 / (first + 7 * each),
        "That leaves out the wait for the first token.": 1e3 / each,
        "That is the table's figure, for answers of its own length.": record.throughput(row),
    }
    within(answer, span(lambda a, b: 8e3 / (a + 7 * b), printed(first, 2), printed(each, 2)), mistakes)
    return f"{right:,.0f} tokens/s; with the table's longer answers it is {record.throughput(row):,.0f}."


@judge("04.3")
def most_room(answer: Any, record: Record) -> str:
    rows = {row.name: row for row in record.measured(1)}
    share = {name: row.limit_s / row.median("tpot_s") for name, row in rows.items()}
    name = choice(answer, list(rows))
    more = f"{name}'s limit is {share[name]:.0%} of its TPOT; another has less."
    expect(round(share[name], 2) == round(min(share.values()), 2), more)
    return f"Its TPOT is {1 / share[name]:.0f} times its limit."


@judge("04.4")
def break_even(answer: Any, record: Record) -> str:
    eager, row = tpot(record.row("pytorch fp32")), record.row("aot fp32")
    engine, build = tpot(row), row.build_s
    never = any(word in str(plain(answer)).casefold() for word in ("never", "inf"))
    if round(eager, 2) - round(engine, 2) < 0.015:  # the last digit that is printed may be rounding
        same = "With this record's engine a token takes no less than without it, as far as the printed figures tell."
        expect(never, f"{same} What can win the build back?")
        return "In this record the engine saves nothing that its figures show."
    saves = f"A token takes {engine:.2f} ms with the engine and {eager:.2f} ms without: each saves something."
    expect(not never, f"{saves} After how many is that as much as the build took?")
    right = build * 1e3 / (eager - engine)
    mistakes = {
        "A token still takes its time with the engine: what it saves is the difference.": build * 1e3 / eager,
        "That counts answers, not tokens.": right / record.workload.output_len,
    }
    allowed = span(lambda s, a, b: s * 1e3 / (a - b), printed(build, 0), printed(eager, 2), printed(engine, 2))
    within(answer, allowed, mistakes)
    return f"About {right:,.0f} tokens, or {right / record.workload.output_len:,.0f} answers of the table's length."


@judge("04.5")
def fastest_setting(answer: Any, sweep: Record, promise_s: float) -> str:
    rows = [row for row in sweep.rows if row.status == "ok"]
    named = [answer.name, answer.batch_size] if hasattr(answer, "batch_size") else alone(answer)  # a row
    items = named.split(",") if isinstance(named, str) else named
    expect(isinstance(items, list) and len(items) == 2, "Two things are asked for: a name and a batch size.")
    name, batch = choice(items[0], sorted({row.name for row in rows})), whole(items[1])
    row = next((row for row in rows if (row.name, row.batch_size) == (name, batch)), None)
    if row is None:
        raise InputError(f"{name} was not measured at batch {batch}.")
    late = f"{name} at batch {batch} takes {tpot(row):.2f} ms a token; promised are {promise_s * 1e3:.2f}."
    expect(row.median("tpot_s") <= promise_s, late)
    best = max((other for other in rows if other.median("tpot_s") <= promise_s), key=sweep.throughput)
    slower = f"That gives {sweep.throughput(row):,.0f} tokens/s; another that keeps the promise gives more."
    expect(sweep.throughput(row) >= sweep.throughput(best), slower)
    return f"{sweep.throughput(best):,.0f} tokens/s, and {tpot(best):.2f} ms a token."


@judge("04.6")
def graph_for_two(answer: Any) -> None:
    from helpers.recipe import BuildRecipe

    expect(isinstance(answer, BuildRecipe), "This is no recipe.")
    expect(answer.backend == "aot", f"Its backend is {answer.backend!r}.")
    expect(answer.max_batch_size >= 4, f"It takes only {answer.max_batch_size} sequences.")
    expect(2 in answer.decode_batch_sizes, "Two sequences would still run in the graph for all four.")
    expect(4 in answer.all_decode_batch_sizes, "Four sequences would run in a graph for more.")


def with_impostor(record: Record) -> Record:
    """A copy in which one contender is fast because it computes something else."""
    fake = copy.deepcopy(record)
    row = impostor(fake)
    for metric in ("tpot_s", "e2e_s", "itl_s"):
        setattr(row, metric, [0.6 * value for value in getattr(row, metric)])
    row.tokens_equal, row.logit_error = 3, 0.83
    return fake


def impostor(record: Record) -> Row:
    rows = [row for row in record.measured(1) if row.name != "pytorch fp32"]
    return rows[sum(len(row.name) for row in rows) % len(rows)]  # the same wherever the notebook is graded


@judge("04.7")
def fast_and_wrong(answer: Any, record: Record) -> str:
    name = choice(answer, [row.name for row in record.measured(1)])
    expect(name == impostor(record).name, f"{name} computes what its precision allows.")
    return f"{name}: three tokens as in fp32, and then another text. Its speed counts for nothing."
