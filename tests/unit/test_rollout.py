# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""What a rollout plans and tells, and what the verbs make of what hosts and gateway say."""

from __future__ import annotations

import base64
import copy
import json
from base64 import b64encode
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.core.plugins.action.rollout_progress import report
from ansible_collections.gpufleet.core.plugins.filter.rollout import (
    batches,
    changes,
    gateway_drains,
    outcomes,
    programs_on_release,
    release_before,
    removable,
    returning,
    target,
)
from ansible_collections.gpufleet.core.plugins.filter.verbs import doctor_document, status_document, status_lines

from .test_supervisor_template import fleet as derived


@pytest.fixture
def fleet() -> dict[str, Any]:
    """Two hosts with 2 and 8 GPUs."""
    return derived({"gpu_count": 2})


VIP = "10.0.0.9"


@pytest.fixture
def two() -> dict[str, Any]:
    """The same behind two gateways."""
    gateways = [{"host": name} for name in ("gw1", "gw2")]
    return {**derived({"gpu_count": 2}), "gateways": gateways, "vip": {"address": VIP}, "url": f"http://{VIP}:9999"}


def entry(host: str, index: int, change: str = "changed", instance: str | None = "") -> dict[str, Any]:
    known = f"tts-{host}-{index}" if instance == "" else instance
    program, port = f"gpufleet-tts-{index}", 12321 + index
    return {"program": program, "change": change, "instance": known, "port": port, "from": "1", "to": "2"}


def ids(steps: list[list[dict[str, Any]]]) -> list[list[str]]:
    return [[one["id"].removeprefix("tts-") for one in step] for step in steps]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("gpu01", ["tts-gpu01-0", "tts-gpu01-1"]),
        ("gpu02:7", ["tts-gpu02-7"]),
        ("tts-gpu02-3", ["tts-gpu02-3"]),
        (" gpu02:7, gpu01:0,gpu02:7", ["tts-gpu01-0", "tts-gpu02-7"]),
    ],
)
def test_a_target_is_a_host_a_card_an_instance_or_several(fleet: dict[str, Any], wanted: str, names: list[str]) -> None:
    assert [instance["id"] for instance in target(fleet, wanted)] == names
    assert len(target(fleet, "tts")) == 10


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("", "There is no target. Name a host, host:GPU, an instance or a service with -e target="),
        (None, "There is no target."),
        ("gpu1", "The fleet has no gpu1. Did you mean gpu0"),
        ("gpu01,all", "The fleet has no all. Name a host"),
        ("gpu01:2", "Hosts: gpu01, gpu02; services: tts."),
    ],
)
def test_no_target_and_an_unknown_one_are_refused(fleet: dict[str, Any], wanted: str | None, said: str) -> None:
    with pytest.raises(AnsibleFilterError) as refused:
        target(fleet, wanted)
    assert said in str(refused.value)


def test_a_host_is_removed_only_where_others_serve_on(fleet: dict[str, Any], two: dict[str, Any]) -> None:
    (gateway,) = (one["host"] for one in fleet["gateways"])
    groups = {"all": ["gpu01", "gpu02", "old", gateway, "gw1"]}
    assert removable(two, "gw1", groups) == []
    assert [instance["id"] for instance in removable(fleet, "gpu01", groups)] == ["tts-gpu01-0", "tts-gpu01-1"]
    assert removable(fleet, "old", groups) == []
    alone = {**fleet, "instances": [one for one in fleet["instances"] if one["host"] == "gpu01"]}
    for arguments, said in (
        ((fleet, None), "There is no target"),
        ((fleet, "gpu1"), "The inventory has no host gpu1"),
        ((alone, "gpu01"), "gpu01 has the last GPUs of tts"),
        ((fleet, gateway), f"{gateway} is the only gateway"),
    ):
        with pytest.raises(AnsibleFilterError, match=said):
            removable(*arguments, groups)


def test_what_leaves_goes_first_then_the_canary_alone_then_the_rest(fleet: dict[str, Any]) -> None:
    pending = {
        "gpu02": [entry("gpu02", index) for index in range(3)],
        "gpu01": [entry("gpu01", 0), entry("gpu01", 1, "leaving")],
    }
    assert ids(batches(pending, fleet)) == [["gpu01-1"], ["gpu01-0"], ["gpu02-0"], ["gpu02-1"], ["gpu02-2"]]
    assert ids(batches(pending, fleet, 2)) == [["gpu01-1"], ["gpu01-0"], ["gpu02-0", "gpu02-1"], ["gpu02-2"]]
    assert batches(pending, fleet)[1][0]["address"] == "10.0.0.1"
    assert batches({"gpu01": []}, fleet) == []


@pytest.mark.parametrize(("batch", "size"), [(1, 1), ("3", 3), ("20%", 2), ("29%", 2), ("1%", 1), ("100%", 7)])
def test_a_batch_is_a_number_or_a_percentage_of_the_fleet(fleet: dict[str, Any], batch: Any, size: int) -> None:
    steps = batches({"gpu02": [entry("gpu02", index) for index in range(8)]}, fleet, batch)
    assert len(steps[0]) == 1
    assert max(len(step) for step in steps) == size
    assert sum(len(step) for step in steps) == 8


@pytest.mark.parametrize("batch", [0, -1, "half", "0%", "101%", "", None, 1.5])
def test_other_batches_are_refused(fleet: dict[str, Any], batch: Any) -> None:
    with pytest.raises(AnsibleFilterError, match="rollout_batch"):
        batches({}, fleet, batch)


def test_a_program_that_only_supervisord_knows_has_a_name_for_people(fleet: dict[str, Any]) -> None:
    (step,) = batches({"gpu01": [entry("gpu01", 5, "leaving", None)]}, fleet)
    assert (step[0]["id"], step[0]["instance"]) == ("gpufleet-tts-5 on gpu01", None)


def test_outcomes_say_why_and_what_it_took(fleet: dict[str, Any]) -> None:
    (step,) = batches({"gpu01": [entry("gpu01", 0)]}, fleet)
    drained = {"results": [{"seconds": 3.1}]}
    (good,) = outcomes(step, drained, {"gpu01": {"seconds": {"stop": 0.4, "ready": 5.0}}})
    assert (good["result"], good["seconds"]) == ("ok", {"drain": 3.1, "stop": 0.4, "ready": 5.0})
    message = "gpufleet-tts-0: Put back on its previous settings, it runs. It failed: EXITED\nLast lines of x:\n  boom"
    (bad,) = outcomes(step, drained, {"gpu01": {"failed": True, "msg": message}})
    assert bad["result"] == "failed: Put back on its previous settings, it runs. It failed: EXITED"
    (dead,) = outcomes(step, drained, {"gpu01": {"unreachable": True, "msg": "no route"}})
    assert dead["result"] == "failed: no route"
    busy = {"failed": True, "results": [{"failed": True, "msg": "Still at work"}]}
    (early,) = outcomes(step, busy, {"gpu01": {"pending": []}})
    assert early["result"] == "not begun: Still at work"


def test_what_may_serve_again_is_asked_unless_it_left_and_a_failed_restart_stays_drained(fleet: dict[str, Any]) -> None:
    """Another failed instance is back on what it ran before, and the drain module asks it; at the fleet's port."""
    pending = {"gpu02": [entry("gpu02", index, "restart") for index in range(3)] + [{**entry("gpu02", 3), "port": 9}]}
    pending["gpu01"] = [entry("gpu01", 7, "leaving"), entry("gpu01", 5, "leaving", None)]
    batch = [one for step in batches(pending, fleet) for one in step]
    results = {
        "gpu01": "ok",
        "gpu02-0": "ok",
        "gpu02-1": "failed: x",
        "gpu02-2": "not begun: x",
        "gpu02-3": "failed: x",
    }
    told = [
        {"result": next(results[key] for key in results if one["id"].removeprefix("tts-").startswith(key))}
        if one["instance"]
        else {"result": "ok"}
        for one in batch
    ]
    assert [(one["id"], one["port"]) for one in returning(batch, told, fleet)] == [
        ("tts-gpu01-7", None),
        ("tts-gpu02-0", 12321),
        ("tts-gpu02-2", 12323),
        ("tts-gpu02-3", 12324),
    ]


def test_the_audit_log_has_what_a_run_changed_without_a_rollout(fleet: dict[str, Any]) -> None:
    programs = {"gpu01": {"added": ["gpufleet-tts-1"], "started": ["gpufleet-tts-0"]}, "gpu02": {}}
    nginx = {"changed": True, "digest": "b", "digest_before": "a"}
    told = changes(fleet, programs, "gw1", nginx)
    assert [(line["what"], line["instance"], line["from"], line["to"]) for line in told] == [
        ("add", "tts-gpu01-1", None, "serving"),
        ("start", "tts-gpu01-0", "down", "serving"),
        ("configure", "gw1", "a", "b"),
    ]
    assert changes(fleet, {"gpu01": {"added": []}}, "gw1", {"changed": False}) == []


def test_progress_tells_the_last_batch_and_the_time_to_go_and_the_end_tells_all(fleet: dict[str, Any]) -> None:
    step = batches({"gpu02": [entry("gpu02", 0), entry("gpu02", 1)]}, fleet, 2)
    results = {"gpu02": {"seconds": {"stop": 0.4, "ready": 5.0}}}
    done = [one for batch in step for one in outcomes(batch, {"results": [{"seconds": 3.0}]}, results)]
    assert report(done[:1], 4, 9, 1) == [
        "tts-gpu02-0  changed  1 -> 2  ok  drain 3.0 s, stop 0.4 s, ready 5.0 s",
        "1 of 4 after 9 s, about 27 s to go",
    ]
    failed = [*done, {**done[0], "result": "failed: boom", "seconds": {}}]
    lines = report(failed, 4, 20)
    assert len(lines) == 4
    assert lines[-1].startswith("3 of 4 after 20 s; 1 FAILED, the rest was left as it was. Correct the cause and run")
    restarts = [{**one, "change": "restart"} for one in failed]
    assert report(restarts, 4, 20)[-1].endswith("stays drained until then, or until playbooks/undrain.yml")


def test_going_back_changes_release_and_version_of_that_service_alone() -> None:
    def section(name: str, service: str, version: str) -> str:
        return (
            f"[program:gpufleet-{name}]\ncommand = x {version}\n"
            f"directory = /opt/gpufleet/{service}/releases/{version}\n"
            f"environment = A='{version}',SLOT_GUARD_VERSION='{version}'\n"
        )

    text = "# head\n" + section("a-0", "a", "new") + section("a-1", "a", "old") + section("b-0", "b", "new")
    back = programs_on_release(text, "/opt/gpufleet/a/releases", "old")
    expected = section("a-0", "a", "old").replace("x old", "x new").replace("A='old'", "A='new'")
    assert back == "# head\n" + expected + section("a-1", "a", "old") + section("b-0", "b", "new")


def recorded(*served: str) -> dict[str, Any]:
    return {"content": base64.b64encode("".join(f"{one}\n" for one in served).encode()).decode()}


def points_at(release: str) -> dict[str, Any]:
    return {"stat": {"exists": True, "lnk_target": f"/opt/gpufleet/tts/releases/{release}"}}


@pytest.mark.parametrize(
    ("now", "before"),
    [
        (("c", "c"), "a"),  # the second host was left out when b was rolled out
        (("b", "a"), "0"),  # gone back once already
        (("a", "a"), "0"),
        (("new", "new"), "c"),  # a link that no record knows is newer than all
    ],
)
def test_going_back_is_to_what_served_on_all_hosts(now: tuple[str, str], before: str) -> None:
    records = {"gpu01": recorded("c", "b", "a", "0"), "gpu02": recorded("c", "a", "0")}
    assert release_before(records, map(points_at, now), "tts") == before


def test_there_is_no_going_back_to_what_some_host_never_had() -> None:
    records = {"gpu01": recorded("b", "a"), "gpu02": recorded("b"), "gpu03": {"failed": True}}
    told = (
        "gpu01 has a from before b; gpu02 has none from before b; gpu03 has none from before the first. "
        "Name one that is on all of them with -e version=…"
    )
    with pytest.raises(AnsibleFilterError) as refusal:
        release_before(records, [points_at("b"), points_at("b"), {"stat": {"exists": False}}], "tts")
    assert told in str(refusal.value)


def page(instances: list[dict[str, Any]], status: str = "healthy") -> dict[str, Any]:
    return {"content": json.dumps({"status": status, "instances": instances})}


def seen(fleet: dict[str, Any]) -> dict[str, Any]:
    """Arguments of doctor_document for a fleet in which all is well; the last gateway has the common address."""
    programs: dict[str, str] = {}
    for one in fleet["instances"]:
        programs[one["host"]] = programs.get(one["host"], "") + f"{one['program']}   RUNNING   pid 7, uptime 0:01:00\n"
    names = [one["id"] for one in fleet["instances"]]
    answers = {name: {"status": {"state": "ready"}, "problem": "", "smoke": ""} for name in names}
    count = len(fleet["gateways"])
    return {
        "programs": programs,
        "answers": [{"instances": copy.deepcopy(answers)} for _ in range(count)],
        "configurations": [configuration(names) for _ in range(count)],
        "pages": [page([{"id": name, "state": "ready"} for name in names]) for _ in range(count)],
        "addresses": [{"stdout": ""} for _ in range(count - 1)] + [HOLDS] if fleet["vip"] else [],
    }


HOLDS = {"stdout": f"eth0@if42        UP             {VIP}/32 "}
NOT_THERE = {"unreachable": True, "msg": "No route to host"}


def configuration(names: list[str]) -> dict[str, str]:
    """What is read of an nginx configuration that routes to instances."""
    text = "server_name _;\n" + "".join(f"        server_name {name};\n" for name in names)
    return {"content": b64encode(text.encode()).decode()}


def test_a_fleet_in_which_all_agree_is_well(fleet: dict[str, Any], two: dict[str, Any]) -> None:
    for given in (fleet, two):
        document = doctor_document(given, **seen(given))
        assert (document["ok"], document["faults"], len(document["instances"])) == (True, [], 10)
    assert document["gateways"] == [{"host": "gw1", "has_vip": False}, {"host": "gw2", "has_vip": True}]


def test_each_disagreement_is_named(fleet: dict[str, Any]) -> None:
    found = seen(fleet)
    found["programs"]["gpu01"] = (
        "gpufleet-tts-0  BACKOFF  Exited\ngpufleet-old-0  RUNNING  pid 1\nother  RUNNING  pid 2\n"
    )
    del found["programs"]["gpu02"]
    found["answers"][0]["instances"]["tts-gpu01-0"]["problem"] = "refused"
    names = [one["id"].replace("tts-gpu01-1", "tts-gpu09-0") for one in fleet["instances"]]
    found["configurations"] = [configuration(names)]
    found["pages"] = [page([{"id": "tts-gpu01-0", "state": "down", "reason": "refused"}, {"id": "tts-gpu08-0"}])]
    document = doctor_document(fleet, **found)
    assert not document["ok"]
    faults = "\n".join(document["faults"])
    assert (
        "tts-gpu01-0: program gpufleet-tts-0 on gpu01 is BACKOFF; the gateway gets no good answer: refused; "
        "the page has it as down: refused\n"
        "tts-gpu01-1: program gpufleet-tts-1 on gpu01 is missing; it is not in the gateway's nginx configuration"
    ) in faults
    assert "tts-gpu02-0: program gpufleet-tts-0 on gpu02 is unknown, its host cannot be asked" in faults
    assert "tts-gpu09-0: nobody expects it, and the gateway routes to it" in faults
    assert "tts-gpu08-0: nobody expects it, and it is on the page" in faults
    assert "gpufleet-old-0 on gpu01: nobody expects it, and it is RUNNING" in faults
    assert "other" not in faults


def test_of_two_gateways_each_is_looked_at(two: dict[str, Any]) -> None:
    found = seen(two)
    found["answers"][1]["instances"]["tts-gpu01-0"]["problem"] = "refused"
    states = [{"id": one["id"], "state": "ready"} for one in two["instances"]]
    states[3]["state"] = "drained"
    found["pages"][0] = page(states)
    document = doctor_document(two, **found)
    drained = states[3]["id"]
    assert document["faults"] == [
        "tts-gpu01-0: gw2: the gateway gets no good answer: refused",
        f"{drained}: it is drained on gw1 and not on gw2; run drain.yml or undrain.yml",
    ]
    row = next(row for row in document["instances"] if row["id"] == drained)
    assert (row["page"], row["answers"], row["routed"]) == ({"gw1": "drained", "gw2": "ready"}, True, True)


def test_a_gateway_that_is_dead_is_named_and_the_other_one_shown(two: dict[str, Any]) -> None:
    found = seen(two)
    for results in ("answers", "configurations", "pages", "addresses"):
        found[results][0] = NOT_THERE
    assert doctor_document(two, **found)["faults"] == ["gw1: this gateway cannot be asked: No route to host"]
    document = status_document(two, found["pages"], found["addresses"], [NOT_THERE, {"drains": {}}])
    assert document["ok"]
    assert document["faults"] == ["gw1: the agent does not tell the state of the cluster: No route to host"]
    assert len(document["instances"]) == 10
    assert status_lines({**document, "instances": []})[-1].endswith(f"available at http://{VIP}:9999, on gw2")


def test_a_drain_is_told_with_who_why_and_since_when(fleet: dict[str, Any]) -> None:
    told = {"by": "operator", "since": "noon", "reason": None}
    one = {"id": "tts-gpu01-0", "state": "down", "in_flight": None, "slots": 2, "version": "f00d", "since": "one"}
    told_page = page([{**one, "reason": "refuses", "drain": told}, {**one, "id": "tts-gpu01-1", "drain": None}])
    record = {"owner": "operator", "by": "alice@desk", "since": "noon", "reason": "fan"}
    for flags, who in (
        ({"drains": {one["id"]: record}}, "alice@desk since noon: fan"),
        (NOT_THERE, "operator since noon: "),
    ):
        first, second, *_ = status_lines(status_document(fleet, [told_page], [], [flags]))
        assert f"since one  refuses; drained by {who}" in first
        assert second.endswith("since one")


@pytest.mark.parametrize(
    ("addresses", "fault"),
    [
        ([HOLDS, HOLDS], f"gw1 and gw2 have {VIP} at a time: they do not hear each other"),
        (
            [{"stdout": ""}, NOT_THERE],
            f"no gateway has {VIP}: on none of those that can be asked does nginx serve and keepalived run",
        ),
    ],
)
def test_one_gateway_has_the_common_address(two: dict[str, Any], addresses: list[Any], fault: str) -> None:
    found = {**seen(two), "addresses": addresses}
    assert doctor_document(two, **found)["faults"] == [fault]
    document = status_document(two, found["pages"], addresses, [{}, {}])
    assert (document["ok"], document["faults"]) == (False, [fault])


def test_an_agent_that_does_not_answer_is_a_fault(fleet: dict[str, Any]) -> None:
    for silent in ({"msg": "Connection refused"}, {"content": "<html>"}, {"content": '{"error": {}}'}):
        document = status_document(fleet, [silent], [], [{}])
        assert not document["ok"]
        assert status_lines(document)[0].startswith("the agent does not tell the state of the cluster")


OPERATORS, HANDMADE, ROLLOUTS = {"owner": "operator", "by": "alice@desk"}, {}, {"owner": "rollout"}


def told(drains: dict[str, Any], gateways: list[str] | None = None) -> dict[str, Any]:
    return {"drains": drains, "gateways": gateways}


@pytest.mark.parametrize("gateways", [None, ["gw1", "gw2"]])
def test_gateways_take_over_what_operators_drained_and_not_what_a_rollout_left(gateways: list[str] | None) -> None:
    """At their first runs too, and at the first one that notes whose they are."""
    first, second = {"a": OPERATORS, "b": ROLLOUTS}, {"b": OPERATORS, "c": ROLLOUTS, "d": HANDMADE}
    both = {"gw1": told(first, gateways), "gw2": told(second, gateways)}
    everywhere = {"a": OPERATORS, "b": OPERATORS, "d": HANDMADE}
    assert gateway_drains(both, "gw1") == everywhere
    assert gateway_drains(both, "gw2") == {**everywhere, "c": ROLLOUTS}


def test_a_gateway_that_comes_back_has_what_those_have_that_stayed() -> None:
    stayed = told({"a": ROLLOUTS, "b": OPERATORS}, ["gw1"])
    stale = told({"b": ROLLOUTS, "c": OPERATORS}, ["gw1", "gw2"])
    for gateway in ("gw1", "gw2"):
        assert gateway_drains({"gw1": stayed, "gw2": stale}, gateway) == stayed["drains"]


def test_a_new_gateway_keeps_away_from_what_failed_in_a_rollout() -> None:
    two = ["gw1", "gw2"]
    gateways = {"gw1": told({"a": ROLLOUTS}, two), "gw2": told({"a": ROLLOUTS}, two), "gw3": told({})}
    assert gateway_drains(gateways, "gw3") == {"a": ROLLOUTS}


def test_where_each_gateway_was_without_the_other_no_drain_is_lost() -> None:
    gateways = {"gw1": told({"a": OPERATORS}, ["gw1"]), "gw2": told({"b": OPERATORS}, ["gw2"])}
    assert gateway_drains(gateways, "gw1") == {"a": OPERATORS, "b": OPERATORS}
    assert gateway_drains({"renamed": gateways["gw1"]}, "renamed") == {"a": OPERATORS}
