"""What an operator does every day: edit a copy of the inventory, run playbooks, look at the gateway's page."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from testbed import PROJECT
from testbed.shell import run


class Inventory:
    """A copy of an inventory in `path`, as deep below the project as the original is: its relative paths hold.

    `variables` is the file that describes its only service.
    """

    def __init__(self, original: Path, path: Path, variables: str) -> None:
        self.original, self.path, self.variables = original, path, variables
        self.restore()

    def restore(self) -> None:
        """Make it equal to the original again."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.original, self.path, symlinks=True)

    @contextmanager
    def edited(self, file: str) -> Iterator[Any]:
        """Give a file's contents to be changed in place, and write them."""
        path = self.path / file
        contents = yaml.safe_load(path.read_text())
        yield contents
        path.write_text(yaml.safe_dump(contents, allow_unicode=True))

    @contextmanager
    def service(self) -> Iterator[dict[str, Any]]:
        """Give the only service to be changed."""
        with self.edited(self.variables) as variables:
            (service,) = variables["services"].values()
            yield service


class Operator:
    """Runs the playbooks, as ops do, against the copy of the inventory."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory

    def command(self, name: str, *options: str, **variables: Any) -> list[str]:
        """The command line of playbooks/NAME.yml, or of site.yml, with extra variables."""
        playbook = PROJECT / (f"{name}.yml" if name == "site" else f"playbooks/{name}.yml")
        settings = ["env", "--unset=ANSIBLE_FORCE_COLOR", f"ANSIBLE_CONFIG={PROJECT / 'ansible.cfg'}"]
        ansible = [sys.executable, "-m", "ansible", "playbook", "-i", os.fspath(self.inventory.path)]
        return [*settings, *ansible, "-e", json.dumps(variables), *options, os.fspath(playbook)]

    def play(self, name: str, *options: str, **variables: Any) -> str:
        """Run a playbook to its end and return what it printed; CommandFailed where it fails."""
        return run(*self.command(name, *options, **variables), seconds=600)

    def document(self, name: str, **variables: Any) -> dict[str, Any]:
        """Run a verb and return its document, and the exit code as `exit_code`."""
        done = subprocess.run(self.command(name, output="json", **variables), capture_output=True, timeout=600)
        return {**json.loads(done.stdout), "exit_code": done.returncode}


class Page:
    """The gateway's page, and the fleet's states on it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def answers(self, seconds: float = 10) -> bool:
        """Whether it is there within some seconds and the fleet serves."""
        try:
            return httpx.get(f"{self.url}/health", trust_env=False, timeout=seconds).status_code == 200
        except httpx.TransportError:
            return False

    def read(self) -> dict[str, Any]:
        """The document as it is now."""
        document: dict[str, Any] = httpx.get(f"{self.url}/cluster/status", trust_env=False, timeout=10).json()
        return document

    def states(self) -> dict[str, str]:
        """State by instance."""
        return self.column("state")

    def column(self, name: str) -> dict[str, Any]:
        """One of its fields by instance; empty while the agent does not answer."""
        return {instance["id"]: instance[name] for instance in self.read().get("instances", [])}

    def wait_for(self, state: str, *instances: str, seconds: float = 5) -> None:
        """Return once the instances named, or all of the fleet, are in a state."""

        def reached() -> bool:
            states = self.states()
            return bool(states) and all(states.get(name) == state for name in instances or states)

        wait_until(reached, seconds, self.states)


def words(text: str) -> str:
    """What a playbook printed without its line breaks: long messages are folded."""
    return " ".join(text.split())


def wait_until(condition: Callable[[], bool], seconds: float, shown: Callable[[], object] = lambda: "") -> None:
    """Return once the condition holds; fail after `seconds`, with what `shown` returns."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"it did not come about in {seconds} s: {shown()}"
        time.sleep(0.1)
