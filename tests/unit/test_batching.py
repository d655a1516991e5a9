"""The batching simulator against laws, and against times that follow from its steps by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.course import batching
from helpers.course.batching import Request, StepTimes, simulate
from helpers.errors import InputError

TIMES = StepTimes({1: 2.0, 2: 3.0, 4: 5.0}, 0.5, "by hand")
EVEN = StepTimes({8: 1.0}, 0.0, "a step takes as long for eight as for one, and reading a prompt takes none")
LIMITS = {"max_batch": 4, "cache_tokens": 128, "max_seq_len": 64}
WAYS = [{"in_flight": in_flight, "paged": paged} for in_flight in (False, True) for paged in (False, True)]
request = st.builds(Request, st.integers(0, 60), st.integers(1, 24), st.integers(1, 40))
requests = st.lists(request, min_size=1, max_size=20)
ways = st.sampled_from(WAYS)


def test_a_request_alone_takes_its_prompt_and_a_step_for_each_token_but_the_first():
    for way in WAYS:
        line = simulate([Request(1.0, 10, 5)], TIMES, **LIMITS, **way)
        assert line.first == [1 + 10 * 0.5] and line.finished == [1 + 10 * 0.5 + 4 * 2.0]


def test_static_waits_for_the_longest_answer_and_in_flight_does_not():
    three = [Request(0, 2, 2), Request(0, 2, 6), Request(1, 2, 2)]
    limits = {**LIMITS, "max_batch": 2}
    static = simulate(three, TIMES, in_flight=False, **limits)
    # Both prompts: 2 s. Five steps of a batch of two: 15 s. Then the third: its prompt 1 s, one step 2 s.
    assert static.finished == [5, 17, 20] and static.started[2] == 17
    flying = simulate(three, TIMES, **limits)
    # The first leaves after 5 s. The third's prompt takes 1 s; then steps of two: it has two tokens after 9 s.
    assert flying.started[2] == 5 and flying.finished[0] == 5 and flying.finished[2] == 9
    assert flying.finished[1] == 9 + 3 * 2.0  # 1 (prompt) + 1 + 1 tokens so far; three more, alone


def test_a_batch_takes_the_time_of_the_next_size_that_was_measured():
    assert [TIMES.of_batch(size) for size in (1, 2, 3, 4)] == [2.0, 3.0, 5.0, 5.0]


@given(requests, ways)
@settings(deadline=None)
def test_every_token_is_made_once_in_order_and_within_the_limits(every, way):
    line = simulate(every, TIMES, **LIMITS, **way)
    for r, started, first, finished in zip(every, line.started, line.first, line.finished, strict=True):
        assert r.arrival <= started < first <= finished
    assert all(1 <= step.batch <= 4 and step.used <= step.held <= 128 and step.queue >= 0 for step in line.steps)
    for one, following in zip(line.steps, line.steps[1:], strict=False):
        assert one.end <= following.start
    in_order = sorted(range(len(every)), key=lambda i: every[i].arrival)
    joined = [line.started[i] for i in in_order]
    assert joined == sorted(joined)  # nobody overtakes
    if way["in_flight"]:  # work is conserved: prompts are read once, and each step gives one token to all in it
        decoded = sum(s.batch for s in line.steps) - len(every)
        assert decoded == sum(r.answer - 1 for r in every)


@given(requests, st.booleans())
@settings(deadline=None)
def test_in_flight_is_never_later_where_a_step_costs_the_same_for_all(every, paged):
    static, flying = (
        simulate(every, EVEN, max_batch=3, cache_tokens=192, max_seq_len=64, in_flight=way, paged=paged)
        for way in (False, True)
    )
    assert all(a <= b for a, b in zip(flying.finished, static.finished, strict=True))
    assert flying.mean_seconds() <= static.mean_seconds()


def test_in_flight_can_be_later_where_two_cost_twice_as_much_as_one():
    """So the law above has its condition: sharing a machine that is busy anyway delays whoever was first."""
    linear = StepTimes({1: 1.0, 2: 2.0}, 0.0, "")
    two = [Request(0, 1, 40), Request(1, 1, 40)]
    static, flying = (simulate(two, linear, **{**LIMITS, "max_batch": 2}, in_flight=way) for way in (False, True))
    assert flying.mean_seconds() > static.mean_seconds()


@given(requests, st.booleans())
@settings(deadline=None)
def test_pages_hold_no_more_than_contiguous_slots(every, in_flight):
    limits = {"max_batch": 4, "cache_tokens": 4 * 64, "max_seq_len": 64, "in_flight": in_flight}  # none has to wait
    paged, contiguous = (simulate(every, TIMES, paged=way, **limits) for way in (True, False))
    assert paged.finished == contiguous.finished
    for one, other in zip(paged.steps, contiguous.steps, strict=True):
        assert one.used == other.used and one.held <= other.held and one.held - one.used < 16 * one.batch + 16 * 4
    assert paged.filled() >= contiguous.filled()


def test_pages_let_more_in_where_memory_is_short():
    every = [Request(0, 8, 8)] * 4
    limits = {"max_batch": 4, "cache_tokens": 64, "max_seq_len": 64}
    largest = [max(s.batch for s in simulate(every, TIMES, paged=paged, **limits).steps) for paged in (False, True)]
    assert largest == [1, 4]


@pytest.mark.parametrize(
    "changes",
    [{"max_batch": 0}, {"max_batch": 5}, {"cache_tokens": 32}, {"max_seq_len": 60}, {"block": 0}, {"max_seq_len": 16}],
    ids=str,
)
def test_what_cannot_be_simulated_is_refused(changes):
    with pytest.raises(InputError) as error:
        simulate([Request(0, 10, 10)], TIMES, **{**LIMITS, **changes})
    assert error.value.fix


def test_step_times_and_requests_that_are_none_are_refused():
    for wrong in ({}, {0: 1.0}, {1: -1.0}):
        with pytest.raises(InputError):
            StepTimes(wrong, 0.1, "")
    for none in ([], [Request(0, 10, 0)]):
        with pytest.raises(InputError):
            simulate(none, TIMES, **LIMITS)


def test_arrivals_have_the_rate_that_is_asked_and_are_the_same_each_time():
    every = batching.arrivals(4000, 50.0, prompt=9, answer=20)
    assert every == batching.arrivals(4000, 50.0, prompt=9, answer=20)
    assert 4000 / every[-1].arrival == pytest.approx(50, rel=0.1)
    assert sum(r.answer for r in every) / 4000 == pytest.approx(20, rel=0.1)
    assert all(1 <= r.answer <= 80 and r.prompt == 9 for r in every)


def test_the_courses_records_give_step_times_and_larger_batches_take_longer():
    for times in batching.reference_steps().values():
        seconds = [times.decode[size] for size in sorted(times.decode)]
        assert len(seconds) > 1 and seconds == sorted(seconds) and 0 < times.prompt_token < 0.01


def test_a_record_gives_its_medians():
    record = next(r for r in batching.references() if r.hardware["device"] == "cpu")
    times = batching.measured_steps(record, "aot fp32")
    assert times.decode[1] == record.row("aot fp32", 1).median("tpot_s") and record.hardware["name"] in times.place
    with pytest.raises(InputError, match="nothing"):
        batching.measured_steps(record, "nothing")


def test_the_table_has_a_row_for_each_way_and_the_picture_says_what_is_in_it():
    every = batching.arrivals(12, 0.05, prompt=4, answer=6)
    table = batching.compare_batching(every, TIMES, **LIMITS)
    assert [row[0] for row in table.rows] == list(batching.NAMES.values()) and "by hand" in table.caption
    line = simulate(every, TIMES, **LIMITS)
    picture = batching.batching_picture(line, "in-flight, paged", until=line.steps[5].start)
    step = [s for s in line.steps if s.start <= line.steps[5].start][-1]
    assert f"a batch of {step.batch}, {step.queue} waiting" in picture.alt and picture.png().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "wrong",
    [{"per_second": 0}, {"per_second": float("nan")}, {"per_second": 1, "answer": 0}, {"count": 30.0, "per_second": 1}],
)
def test_requests_that_never_come_or_want_no_answer_are_refused(wrong):
    with pytest.raises(InputError, match="per second"):
        batching.arrivals(**{"count": 3, **wrong})
