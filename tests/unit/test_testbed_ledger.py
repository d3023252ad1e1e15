import json

from tests.fleet.ledger import parse, peaks, runs


def line(second: int, event: str, request: str, instance: str = "a") -> str:
    return json.dumps({"monotonic": float(second), "event": event, "request": request, "instance": instance})


def test_the_most_at_once_is_counted_by_instance_whatever_the_order_of_lines() -> None:
    lines = [
        line(4, "end", "r2"),
        line(1, "start", "r1"),
        line(2, "start", "r2"),
        line(3, "end", "r1"),
        "",
        line(5, "start", "r3"),
        line(2, "start", "r4", "b"),
    ]
    assert peaks(parse(lines)) == {"a": 2, "b": 1}


def test_work_that_ends_as_the_next_begins_does_not_overlap() -> None:
    assert peaks(parse([line(1, "start", "r1"), line(2, "end", "r1"), line(2, "start", "r2")])) == {"a": 1}


def test_a_request_that_ran_twice_is_seen() -> None:
    assert runs(parse([line(1, "start", "r1"), line(2, "end", "r1"), line(3, "start", "r1", "b")])) == {"r1": 2}
