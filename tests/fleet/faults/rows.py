"""The rows of the matrix, in the order in which they run. Each takes its fault away again."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack

from ..operations import wait_until
from .bed import GATEWAY, Fleet
from .clients import Clients, Manners
from .matrix import row
from .reckoning import Strike
from .stage import Stage

LEAVES = {"before": 0.01, "during": 0.5, "after": 0.98}
"""Seconds after which a client leaves: before, during and as good as after an inference of one second."""

# Clients


@row("Eight times as many requests as slots, at once, three times", beside=True)
def overload(fleet: Stage) -> None:
    for _ in range(3):
        with fleet.clients(8 * fleet.capacity, once=True):
            pass
    fleet.cause_is_gone()


@row("Clients hang up before, during and just after the inference, one-shot and streamed", beside=True)
def hang_ups(fleet: Stage) -> None:
    with ExitStack() as stack, fleet.load(4, seconds_before=0, seconds_after=0):
        for number, (stream, seconds) in enumerate((s, t) for s in (False, True) for t in LEAVES.values()):
            stack.enter_context(fleet.clients(2, Manners(stream=stream, leaves_after=seconds), first=4 + 2 * number))
        time.sleep(10)
    fleet.cause_is_gone()


@row("Clients take 5 s to read 20 MB each", beside=True)
def slow_readers(fleet: Stage) -> None:
    slow = Manners(answer_megabytes=20, read_seconds=5)
    with fleet.load(4, seconds_before=0), fleet.clients(6, slow, first=4):
        time.sleep(8)
    fleet.cause_is_gone()


@row("Clients take 6 s to upload 100 MB each; others hang up in mid-upload", beside=True)
def slow_uploads(fleet: Stage) -> None:
    upload = Manners(upload_megabytes=100, upload_seconds=6)
    with (
        fleet.load(6, seconds_before=0),
        fleet.clients(2, upload, once=True, first=6),
        fleet.clients(2, Manners(upload_megabytes=100, upload_seconds=30, leaves_after=3), once=True, first=8),
    ):
        time.sleep(7)
    fleet.cause_is_gone()


# The gateway


@row("The gateway is reloaded every 0.5 s", beside=True)
def reload_storm(fleet: Stage) -> None:
    with fleet.load():
        for _ in range(20):
            fleet.reload_gateway()
            time.sleep(0.5)
    fleet.cause_is_gone()


@row("kill -9 of one of the gateway's workers", beside=True)
def nginx_worker_killed(fleet: Stage) -> None:
    with fleet.load():
        fleet.kill_gateway_workers(1)


@row("kill -9 of all of the gateway's workers", beside=True)
def nginx_workers_killed(fleet: Stage) -> None:
    with fleet.load():
        fleet.kill_gateway_workers()


@row("kill -9 of all of the gateway's workers, three times within some seconds", beside=True)
def nginx_workers_killed_again(fleet: Stage) -> None:
    with fleet.load():
        for _ in range(3):
            fleet.kill_gateway_workers()
            time.sleep(1)


@row("kill -9 of the agent")
def agent_killed(fleet: Fleet) -> None:
    with fleet.load():
        fleet.sh(GATEWAY, "kill -9 $(supervisorctl pid fleet-agent)")
        fleet.cause_is_gone()


@row("kill -9 of supervisord on the gateway")
def gateway_supervisord_killed(fleet: Fleet) -> None:
    with fleet.load():
        fleet.sh(GATEWAY, "kill -9 $(systemctl show --property MainPID --value supervisor)")
        fleet.cause_is_gone()
        wait_until(lambda: fleet.sh(GATEWAY, "pgrep --count --full '[f]leet_agent --config' || true") == "1", 20)


@row("The gateway loses its power and boots", beside=True)
def gateway_reboot(fleet: Stage) -> None:
    with fleet.load(seconds_after=0):
        fleet.cut_gateway_power()


# A GPU and its host


@row("kill -9 of a GPU's worker process", beside=True)
def worker_killed(fleet: Stage) -> None:
    target = fleet.instance("gpu01", 0)
    with fleet.load(), fleet.strike(target["id"]):
        fleet.kill_worker(target)


@row("kill -9 of a GPU's Gunicorn master", beside=True)
def master_killed(fleet: Stage) -> None:
    target = fleet.instance("gpu01", 0)
    with fleet.load(seconds_after=4), fleet.strike(target["id"]):
        fleet.kill_master(target)
        time.sleep(1)  # the worker that is left learns of it within a second, and ends


@row("kill -9 of supervisord on a GPU host")
def supervisord_killed(fleet: Fleet) -> None:
    with fleet.load(seconds_after=4), fleet.strike(*fleet.instances("gpu01")):
        fleet.sh("gpu01", "kill -9 $(systemctl show --property MainPID --value supervisor)")
        time.sleep(1)


@row("A request that kills its worker each time it is tried", beside=True)
def poison(fleet: Stage) -> None:
    with fleet.load(6), fleet.clients(1, Manners(headers={"X-Simulated-Death": "1"}, pause=4), first=8) as poisoned:
        time.sleep(10)
    fleet.cause_is_gone()
    names = {request.name for request in poisoned.requests}
    for event in fleet.events():
        if event.request in names and event.event == "start":
            fleet.strikes.append(Strike(event.monotonic, event.monotonic + 1, frozenset([event.instance])))


@row("An app that answers 500 at once on one card", beside=True)
def app_500(fleet: Stage) -> None:
    sick_card(fleet, "500")


@row("An app that answers 503 at once on one card", beside=True)
def app_503(fleet: Stage) -> None:
    sick_card(fleet, "503")


@row("An app that answers 429 at once on one card", beside=True)
def app_429(fleet: Stage) -> None:
    sick_card(fleet, "429")
    fleet.note = "429 is how an app refuses one client, so it takes no card out of service, however often it is said"


def sick_card(fleet: Stage, fault: str) -> None:
    """Have one card's app fail in a way, for so long that the breaker must act."""
    with fleet.load(10, seconds_after=0), fleet.sick("gpu03", 1, fault):
        time.sleep(6)


@row("An app whose answers are shorter than announced, on one card", beside=True)
def app_short(fleet: Stage) -> None:
    sick_card(fleet, "short")


@row("What listens on a GPU's port answers with something that is no HTTP", beside=True)
def garbage(fleet: Stage) -> None:
    target = fleet.instance("gpu03", 1)["id"]
    with fleet.load(10, seconds_after=0), fleet.garbled("gpu03", 1), fleet.strike(target):
        time.sleep(6)
        fleet.wait_until_out(target)


@row("A GPU host is frozen for 10 s", beside=True)
def host_frozen(fleet: Stage) -> None:
    host_away(fleet, 10, fleet.frozen("gpu02"))


@row("A GPU host is unreachable for 30 s: its packets are dropped")
def host_unreachable(fleet: Fleet) -> None:
    drop = "nft add table inet faults"
    for hook in ("input", "output"):
        drop += f" && nft add chain inet faults {hook} '{{ type filter hook {hook} priority -300; policy drop; }}'"
    host_away(fleet, 30, fleet.broken_by("gpu02", drop, "nft delete table inet faults"))


@row("A GPU host loses its power, and boots 10 s later")
def host_off(fleet: Fleet) -> None:
    host_away(fleet, 10, fleet.away("gpu02", "kill", "start"))


def host_away(fleet: Stage, seconds: float, away: AbstractContextManager[None]) -> None:
    """Have gpu02 be away for so long; until the agent knows, requests may go there."""
    lost = fleet.instances("gpu02")
    with fleet.load(), ExitStack() as mending:
        began = time.monotonic()
        with fleet.strike(*lost):
            mending.enter_context(away)
            fleet.wait_until_out(*lost)
        time.sleep(max(0.0, began + seconds - time.monotonic()))


@row("A host's models take 60 s to load")
def slow_load(fleet: Fleet) -> None:
    with fleet.load(8, seconds_after=0):
        with fleet.programs_edited("gpu02", "s/LOAD_SECONDS='2'/LOAD_SECONDS='60'/"):
            fleet.wait_until_out(*fleet.instances("gpu02"))
            wait_until(lambda: all(state == "ready" for state in fleet.states().values()), 90)
        fleet.cause_is_gone()


# Disks and clocks


@row("No room on the gateway's disk: logs and temporary files")
def gateway_disk_full(fleet: Fleet) -> None:
    folders = ("/var/log/nginx", "/var/log/gpufleet", "/var/lib/nginx/body", "/var/lib/nginx/proxy")
    with fleet.load(), fleet.full_disk(GATEWAY, *folders, reopen="nginx -s reopen; pkill -USR2 -x supervisord"):
        time.sleep(3)
        fleet.sh("gpu01", f"supervisorctl restart {fleet.instance('gpu01', 0)['program']}")
        time.sleep(3)
        upload = Clients(fleet.url, fleet.addresses[-1:], Manners(upload_megabytes=1), once=True)
        with upload:
            pass
        (request,) = upload.requests
        fleet.note = f"an upload of 1 MB, for which there is no room, is told {request.status} {request.error}"
    fleet.cause_is_gone()


@row("No room on a GPU host's disk, and its worker is killed")
def gpu_disk_full(fleet: Fleet) -> None:
    target = fleet.instance("gpu01", 0)
    folders = ("/var/log/gpufleet", "/var/log/supervisor", "/var/lib/gpufleet")
    with fleet.load(), fleet.full_disk("gpu01", *folders, reopen="pkill -USR2 -x supervisord"):
        time.sleep(2)
        with fleet.strike(target["id"]):
            fleet.kill_worker(target)
        fleet.wait_until_out(target["id"])
        wait_until(lambda: fleet.states().get(target["id"]) == "ready", 90)
    fleet.cause_is_gone()


@row("The clocks of the agent and of a host's guards jump two hours on, and back")
def clock_steps(fleet: Fleet) -> None:
    faked = {GATEWAY: "fleet-agent.conf", "gpu01": "gpufleet.conf"}
    with ExitStack() as stack, fleet.load(8):
        for host, file in faked.items():
            library = fleet.stepped_clock(host, 0)
            edit = f"s|HOME=|LD_PRELOAD='{library}',STEPPED_CLOCK='{library}.seconds',HOME=|"
            stack.enter_context(fleet.programs_edited(host, edit, file))
        wait_until(lambda: bool(fleet.states()) and set(fleet.states().values()) == {"ready"}, 90)
        seen = []
        for hours in (2, -2, 0):
            for host in faked:
                fleet.stepped_clock(host, 3600 * hours)
            time.sleep(4)
            seen.append(fleet.page.read()["timestamp"])
        fleet.note = f"on its page the agent took it for {', '.join(seen)}"
    fleet.cause_is_gone()


# Changes while something breaks


@row("New code is rolled out and taken back; nginx's workers and a GPU's are killed meanwhile")
def rolling_update(fleet: Fleet) -> None:
    target = fleet.instance("gpu03", 1)

    def break_something() -> None:
        fleet.kill_gateway_workers()
        with fleet.strike(target["id"]):
            fleet.kill_worker(target)

    old = fleet.page.column("version")
    with fleet.new_code(), fleet.load(8, seconds_after=0), ThreadPoolExecutor() as pool:
        update = pool.submit(fleet.operator.play, "site")
        wait_until(lambda: "drained" in fleet.states().values() or "draining" in fleet.states().values(), 300)
        break_something()
        update.result()
        new = fleet.page.column("version")
        rollback = pool.submit(fleet.operator.play, "rollback")
        wait_until(lambda: "drained" in fleet.states().values() or "draining" in fleet.states().values(), 300)
        break_something()
        rollback.result()
        fleet.cause_is_gone()
    assert set(old.values()).isdisjoint(new.values()) and fleet.page.column("version") == old
