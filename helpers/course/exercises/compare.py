"""Notebook 04: compare. All figures come from the records that the notebook froze."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from helpers.course.exercises.frame import exercise, expect
from helpers.course.values import Range, choice, plain, printed, span, whole, within

if TYPE_CHECKING:
    from helpers.bench.records import Record, Row


def tpot(row: Row) -> float:
    return row.median("tpot_s") * 1e3  # ms


def read_ms(value: float) -> Range:
    """What the table's figure for so many milliseconds may mean."""
    return printed(value, 2)


@exercise(
    "04.1",
    "How many times shorter?",
    "a number: the fp32 engine's TPOT divided by the int8 engine's, at batch 1",
    "Both stand in the row TPOT of section 4's table. Which of them is the longer?",
    "The longer one over the shorter one, so it says how many times shorter the int8 engine's is.",
)
def times_shorter(answer: Any, record: Record) -> str:
    fp32, int8 = tpot(record.row("aot fp32")), tpot(record.row("aot int8"))
    mistakes = {"That is the other way round: the int8 engine's over the fp32 engine's.": int8 / fp32}
    within(answer, span(lambda a, b: a / b, read_ms(fp32), read_ms(int8)), mistakes)
    return f"{fp32:.2f} ms / {int8:.2f} ms = {fp32 / int8:.1f}."


@exercise(
    "04.2",
    "The throughput of short answers",
    "output tokens per second of the fp32 engine at batch 1, if each answer had only 8 tokens",
    "How long does one answer take? E2E, in seconds, is what stands below the line.",
    "The first token comes with the TTFT. How many TPOTs follow?",
    "The table is in milliseconds, and a second has 1000 of them.",
)
def short_answers(answer: Any, record: Record) -> str:
    row = record.row("aot fp32")
    first, each = row.median("ttft_s") * 1e3, tpot(row)
    right = 8e3 / (first + 7 * each)
    mistakes = {
        "That has 8 TPOTs: the first token comes with the TTFT, and seven follow.": 8e3 / (first + 8 * each),
        "The first of the 8 tokens counts too.": 7e3 / (first + 7 * each),
        "That leaves out the wait for the first token.": 1e3 / each,
        "That is tokens per millisecond.": right / 1e3,
        "That is the table's figure, for answers of its own length.": record.throughput(row),
    }
    within(answer, span(lambda a, b: 8e3 / (a + 7 * b), read_ms(first), read_ms(each)), mistakes)
    return f"{right:,.0f} tokens/s; with the table's longer answers it is {record.throughput(row):,.0f}."


@exercise(
    "04.3",
    "Who has the most room left?",
    "the name of a contender, as in the table of section 4",
    "Room is what lies between a contender's TPOT and its own limit.",
    "The row limit / TPOT of the table: the smaller that share, the more room.",
)
def most_room(answer: Any, record: Record) -> str:
    rows = {row.name: row for row in record.measured(1)}
    share = {name: row.limit_s / row.median("tpot_s") for name, row in rows.items()}
    name = choice(answer, list(rows))
    least = min(share.values())
    more = f"{name}'s limit is {share[name]:.0%} of its TPOT; another has less."
    expect(round(share[name], 2) == round(least, 2), more)
    return f"Its TPOT is {1 / share[name]:.0f} times its limit."


@exercise(
    "04.4",
    "When has the build paid?",
    "a number of tokens, or 'never': after so many, the fp32 engine has won back its build against eager PyTorch",
    "What does each token save, and how often must that be saved?",
    "Each token saves the difference of the two TPOTs. The row build, s says what has to be won back.",
    "The build is in seconds and a TPOT in milliseconds.",
    points=2,
)
def break_even(answer: Any, record: Record) -> str:
    eager, row = tpot(record.row("pytorch fp32")), record.row("aot fp32")
    engine, build = tpot(row), row.build_s
    if eager <= engine:
        never = str(answer).strip().casefold() in ("never", "inf")
        expect(never, "In this record a token saves nothing, so the build is never won back: 'never'.")
        return "In this record the engine saves nothing."
    right = build * 1e3 / (eager - engine)
    mistakes = {
        "The build is in seconds, and the TPOTs are in milliseconds.": right / 1e3,
        "A token still takes its time with the engine: what it saves is the difference.": build * 1e3 / eager,
        "That counts answers, not tokens.": right / record.workload.output_len,
    }
    allowed = span(lambda s, a, b: s * 1e3 / (a - b), printed(build, 0), read_ms(eager), read_ms(engine))
    within(answer, allowed, mistakes)
    return f"About {right:,.0f} tokens, or {right / record.workload.output_len:,.0f} answers of the table's length."


@exercise(
    "04.5",
    "The fastest setting that keeps a promise",
    "a contender and a batch size, such as ('aot fp32', 2), of those in section 8",
    "First leave out every point whose TPOT is above the promise. Then compare what is left.",
    "row.median('tpot_s') is in seconds; sweep.throughput(row) gives the tokens per second of all users together.",
    "Go through sweep.rows, keep those within the promise, and take the one with the largest throughput.",
    points=2,
)
def fastest_setting(answer: Any, sweep: Record, promise_s: float) -> str:
    rows = [row for row in sweep.rows if row.status == "ok"]
    items = answer.split(",") if isinstance(answer, str) else plain(answer)
    expect(isinstance(items, list) and len(items) == 2, "Two things are asked for: a name and a batch size.")
    name, batch = choice(items[0], sorted({row.name for row in rows})), whole(items[1])
    measured = {(row.name, row.batch_size): row for row in rows}
    expect((name, batch) in measured, f"{name} was not measured at batch {batch}.")
    row = measured[name, batch]
    late = f"{name} at batch {batch} takes {tpot(row):.2f} ms a token; promised are {promise_s * 1e3:.2f}."
    expect(row.median("tpot_s") <= promise_s, late)
    best = max((other for other in rows if other.median("tpot_s") <= promise_s), key=sweep.throughput)
    slower = f"That gives {sweep.throughput(row):,.0f} tokens/s; another that keeps the promise gives more."
    expect(sweep.throughput(row) >= sweep.throughput(best), slower)
    return f"{sweep.throughput(best):,.0f} tokens/s, and {tpot(best):.2f} ms a token."


@exercise(
    "04.6",
    "A graph for two",
    "a recipe of the aot backend, for up to four sequences, whose engine has a decode graph for two",
    "Section 8 says why the engine's line bends back at two, and which field of a recipe helps.",
    "workload.recipe('aot', 'fp32') is the recipe that was measured; replace(field=value) changes a copy.",
    "decode_batch_sizes lists the batch sizes that get a decode graph, beside 1 and the largest.",
    points=2,
)
def graph_for_two(answer: Any) -> str:
    from helpers.recipe import BuildRecipe

    expect(isinstance(answer, BuildRecipe), "This is no recipe.")
    expect(answer.backend == "aot", f"Its backend is {answer.backend!r}.")
    expect(answer.max_batch_size >= 4, f"It takes only {answer.max_batch_size} sequences.")
    expect(2 in answer.decode_batch_sizes, "Two sequences would still run in the graph for all four.")
    return "With it, a step for two sequences computes two rows, not four."


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
    return rows[len(record.date + record.commit) % len(rows)]


@exercise(
    "04.7",
    "Fast, and wrong",
    "the name of the contender in with_impostor(record) that computes something else",
    "A wrong answer is no answer, however fast. Which rows of the table are about what was computed?",
    "tokens as fp32, logits off by, and agrees: one column differs.",
    points=2,
)
def fast_and_wrong(answer: Any, record: Record) -> str:
    rows = [row.name for row in record.measured(1)]
    name = choice(answer, rows)
    expect(name == impostor(record).name, f"{name} computes what its precision allows.")
    return f"{name}: three tokens as in fp32, and then another text. Its speed counts for nothing."
