"""Bring the hosts of an inventory up, show them, take them down: `python -m testbed up --inventory inventory/demo`."""

import argparse
import sys
from pathlib import Path

from testbed import hosts, image
from testbed.engine import EngineFailed, this_machine
from testbed.hosts import Bed, BedFailed
from testbed.shell import CommandFailed


def up(bed: Bed) -> None:
    """Bring all hosts up and say for each what that took."""
    engine = this_machine()
    if engine.start():
        print("started a Docker engine", flush=True)
    done = hosts.up(bed, engine, image.build(engine))
    for host in bed.hosts:
        print(f"{host.name:<12} {host.address:<15} {done[host.name]}", flush=True)


def down(bed: Bed) -> None:
    """Remove all of the fleet, then the engine too if it was started here and nothing else runs in it."""
    engine = this_machine()
    if not engine.answers() and not bed.state.exists():
        print(f"{bed.fleet}: no host was there")
        return
    # Containers outlive an engine that was killed: only an engine can remove them.
    engine.start()
    removed = hosts.down(bed, engine)
    for container in removed:
        print(f"{container} removed", flush=True)
    if not removed:
        print(f"{bed.fleet}: no host was there")
    left = hosts.states(bed, engine)
    if set(left.values()) != {"absent"}:
        raise BedFailed(f"still there: {left}")
    if engine.started_here() and engine.idle() and engine.stop():
        print("stopped the Docker engine that was started here")


def status(bed: Bed) -> None:
    """Print each host's address and state."""
    engine = this_machine()
    found = hosts.states(bed, engine) if engine.answers() else {}
    for host in bed.hosts:
        print(f"{host.name:<12} {host.address:<15} {found.get(host.name, 'absent')}")


def main() -> int:
    """Do what the command line asks."""
    verbs = {"up": up, "down": down, "status": status}
    parser = argparse.ArgumentParser(prog="testbed", description=__doc__)
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("--inventory", type=Path, required=True, help="inventory folder whose hosts are meant")
    arguments = parser.parse_args()
    try:
        verbs[arguments.verb](hosts.read_inventory(arguments.inventory))
    except (BedFailed, CommandFailed, EngineFailed) as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
