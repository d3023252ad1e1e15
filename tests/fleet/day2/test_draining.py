"""Drains, with clients asking all the while."""

import time
from collections.abc import Callable
from typing import Any

from ..load import SteadyLoad
from ..operations import Operator, Page, wait_until, words


def test_a_drained_card_gets_no_request_until_undrained(
    operator: Operator,
    page: Page,
    fleet: dict[str, Any],
    load: SteadyLoad,
    ledger: Callable[[], list[Any]],
    audit: Callable[[], list[dict[str, Any]]],
) -> None:
    instance = fleet["instances"][0]
    target = f"{instance['host']}:{instance['gpu']}"

    def events() -> int:
        return len([event for event in ledger() if event.instance == instance["id"]])

    operator.play("drain", target=target, reason="a new fan")
    page.wait_for("drained", instance["id"])
    assert page.column("drain")[instance["id"]]["reason"] == "a new fan"
    by = audit()[0]["by"]
    assert f"drained by {by} since " in words(operator.play("status"))
    before = events()
    time.sleep(4)
    assert events() == before
    operator.play("undrain", target=target)
    page.wait_for("ready", instance["id"])
    wait_until(lambda: events() > before, 15)  # few clients for many cards: its turn may take some seconds
    assert [(line["what"], line["instance"], line["result"]) for line in audit()] == [
        ("drain", instance["id"], "ok"),
        ("undrain", instance["id"], "ok"),
    ]
    assert audit()[0]["reason"] == "a new fan"
