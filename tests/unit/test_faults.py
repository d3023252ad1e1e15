"""The arithmetic of the fault matrix: who is to blame for a request, and what the table says."""

import pytest

from tests.fleet.faults.matrix import Result
from tests.fleet.faults.reckoning import APPS_OWN, OVERLOAD, Request, Strike, most_in_flight, reckon
from tests.fleet.faults.report import cell, cells, document, machine, markdown, merged, side_by_side
from tests.fleet.ledger import Event


def asked(name="r", status=200, error="", began=0.0, ended=1.0, left=False):
    return Request(name, began, ended, status, error, left)


def ran(name="r", instance="a", start=0.1, end=0.9):
    started = Event(start, "start", name, instance)
    return [started] if end is None else [started, Event(end, "end", name, instance)]


def one(request, events=(), strikes=()):
    """The only kind that is counted, or the kinds of faults that are found, of a single request."""
    sums = reckon([request], events, strikes)
    faults = [kind for kind in ("lost", "twice", "wrong") if getattr(sums, kind)]
    counted = [k for k in ("served", "refused", "failed_by_app", "left", "died_with_it") if getattr(sums, k)]
    return ", ".join(faults or counted)


@pytest.mark.parametrize(
    ("request_", "events", "kind"),
    [
        (asked(), ran(), "served"),
        (asked(), [], "wrong"),
        (asked(status=503, error=OVERLOAD), [], "refused"),
        (asked(status=503, error=OVERLOAD), ran(), "wrong"),
        (asked(status=503, error=APPS_OWN), [], "failed_by_app"),
        (asked(status=503, error="something else"), [], "lost"),
        (asked(status=502, error="gpu_failure"), ran(), "lost"),
        (asked(status=None, error="ReadError"), [], "lost"),
        (asked(status=None, left=True), [], "left"),
        (asked(status=None, left=True), ran(end=2), "left"),
        (asked(), ran() + ran(instance="b"), "twice"),
        (asked(status=None, left=True), ran() + ran(), "twice"),
    ],
)
def test_a_request_is_judged_by_its_answer_and_by_what_ran(request_, events, kind):
    assert one(request_, sorted(events)) == kind


def test_what_ran_and_nobody_sent_is_wrong():
    assert reckon([], ran(), []).wrong == ("r ran, and nobody sent it",)


@pytest.mark.parametrize(
    ("strike", "kind"),
    [
        (Strike(0.5, 0.5, frozenset("a")), "died_with_it"),
        (Strike(0.5, 0.5, frozenset()), "died_with_it"),
        (Strike(0.5, 0.5, frozenset("b")), "lost"),
        (Strike(1.5, 2.0, frozenset("a")), "lost"),
        (Strike(-2.0, -1.0, frozenset("a")), "lost"),
    ],
    ids=["its card", "the gateway", "another card", "after it", "before it"],
)
def test_only_what_was_in_the_hands_of_the_dead_died_with_it(strike, kind):
    assert one(asked(status=502, error="gpu_failure"), ran(end=None), [strike]) == kind


def test_a_strike_excuses_neither_a_second_run_nor_a_false_refusal():
    strike = Strike(0.0, 1.0, frozenset())
    assert one(asked(status=502), sorted(ran() + ran(instance="b")), [strike]) == "twice"
    assert one(asked(status=503, error=OVERLOAD), ran(), [strike]) == "wrong"


def test_killed_work_counts_as_long_as_it_may_have_run():
    killed = ran("r1", start=0.0, end=None)
    assert most_in_flight(sorted(killed + ran("r2", start=0.5, end=1.5)), 1.0) == {"a": 2}
    assert most_in_flight(sorted(killed + ran("r2", start=1.1, end=1.5)), 1.0) == {"a": 1}
    again = ran("r1", start=5.0, end=None)
    assert most_in_flight(sorted(killed + again), 1.0) == {"a": 1}


def result(name="row", **fields):
    sums = reckon([asked()], sorted(fields.pop("events", ran())), [])
    whole = {"name": name, "text": "A fault", "sums": sums, "peak": 2, "slots": 2, "unusable": 0, "load": 1.5}
    return Result(**{**whole, "unusable_seconds": 0.0, "recovery_seconds": 1.26, **fields})


def test_a_row_as_it_should_be_shows_its_figures():
    assert cells(result()) == ["A fault", "1", "1", "0", "0", "0", "2 of 2", "0", "0", "0", "0", "0", "1.3 s"]
    assert result().faults == []


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"peak": 3}, "3 in flight on a card with 2 slots"),
        ({"recovery_seconds": None}, "not every slot could be used again"),
        ({"trouble": "it broke"}, "it broke"),
        ({"events": []}, "wrong: r: 200 , ran on no card"),
    ],
)
def test_whatever_should_not_be_makes_a_row_fail(fields, fault):
    assert result(**fields).faults == [fault]


def test_slots_that_stay_away_are_told_with_their_time():
    assert cells(result(unusable=9, unusable_seconds=3.0))[-2] == "9, 3.0 s"
    assert cells(result(unusable=9, unusable_seconds=None, recovery_seconds=None))[-2:] == ["9, to the end", "none"]


def test_the_document_has_a_line_for_each_row_and_says_where_it_was_made():
    text = markdown([result(date="2026-01-02"), result(date="2026-01-01", note="so it was")], machine(), {})
    assert text.count("| A fault |") == 2 and "- A fault: so it was" in text
    assert "2026-01-01 to 2026-01-02" in text and machine()["kernel"] in text
    assert "Beside rivals" not in text


def test_a_contenders_cell_tells_only_what_came_about():
    assert cell(result()) == "1 served"
    assert cell(result(peak=3, events=ran() + ran(instance="b"))) == "1 served, **3 in flight**, **1 twice**"
    assert cell(result(unusable=1, recovery_seconds=0.5)) == "1 served, 1 slot away until 0.5 s after"
    assert cell(result(events=[], unusable=2, recovery_seconds=4.04)) == (
        "0 served, **1 wrong**, 2 slots away until 4.0 s after"
    )
    assert cell(result(unusable=12, unusable_seconds=None, recovery_seconds=None)) == (
        "1 served, **12 slots gone for good**"
    )
    assert cell(result(trouble="it broke")) == "1 served, **the row itself failed**"
    sums = reckon([asked(status=503, error=error) for error in (OVERLOAD, APPS_OWN)], [], [])
    assert cell(result(sums=sums)) == "0 served, 1 refused, 1 app's own"


def test_contenders_stand_side_by_side_with_a_line_for_each_row():
    beside = {"gpufleet": [result("a"), result("b", text="Another")], "HAProxy": [result("b", text="Another", peak=4)]}
    assert side_by_side(beside) == [
        ["A fault", "1 served", ""],
        ["Another", "1 served", "1 served, **4 in flight**"],
    ]
    text = markdown([], machine(), beside)
    assert "| fault | gpufleet | HAProxy |\n| --- | --- | --- |\n" in text and "## In Docker" not in text


def test_rows_that_are_run_anew_take_the_place_of_what_the_table_had():
    here = machine()
    rival = result("a", peak=5)
    earlier = document([result("a"), result("b", events=[]), result("gone")], here, {"HAProxy": [rival]})
    now = [result("b", note="new")]
    assert merged(earlier, now, here, ["b", "a", "c"]) == [*now, result("a")]
    assert merged(earlier, now, {**here, "cores": 999}, ["b", "a", "c"]) == now, "another machine's rows are others"
    assert merged("", now, here, ["b", "a", "c"]) == now
    assert merged(earlier, now, here, ["b", "a", "c"], "HAProxy") == [*now, rival]
    assert merged(earlier, now, here, ["b", "a", "c"], "one that is new") == now
