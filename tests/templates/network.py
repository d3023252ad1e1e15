"""Network namespaces: a host and the network around it, with real addresses and a real firewall, on this machine."""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from testbed.shell import run

CLONE_NEWNET = 0x40000000  # sched.h
NAMESPACES = Path("/run/netns")  # where ip-netns(8) keeps them

LISTEN = """
import socket, sys
every = {"family": socket.AF_INET6, "dualstack_ipv6": True}
listening = [socket.create_server(("::", int(port)), **every) for port in sys.argv[1:]]
print("listening", flush=True)
sys.stdin.read()
"""
CONNECT = """
import json, socket, sys
def connect(source, address, port):
    try:
        socket.create_connection((address, port), timeout=1.5, source_address=(source, 0)).close()
    except OSError as error:
        return type(error).__name__
    return "connected"
print(json.dumps([connect(*attempt) for attempt in json.load(sys.stdin)]))
"""


class Network:
    """A host (namespace `host`) and what is around it (`outside`), each with the addresses given."""

    def __init__(self, host: list[str], outside: list[str]) -> None:
        self.host, self.outside = (f"gpufleet-{os.getpid()}-{side}" for side in ("host", "outside"))
        self.addresses = {self.host: host, self.outside: outside}

    @contextlib.contextmanager
    def up(self) -> Iterator["Network"]:
        """Have it for the length of a block."""
        try:
            for name in self.addresses:
                run("ip", "netns", "add", name)
            far = ("peer", "name", "eth0", "netns", self.outside)
            run("ip", "link", "add", "eth0", "netns", self.host, "type", "veth", *far)
            for name, addresses in self.addresses.items():
                for address in addresses:
                    nodad = ["nodad"] if ":" in address else []
                    run("ip", "-n", name, "address", "add", address, "dev", "eth0", *nodad)
                for device in ("lo", "eth0"):
                    run("ip", "-n", name, "link", "set", device, "up")
            yield self
        finally:
            for name in self.addresses:
                if (NAMESPACES / name).exists():
                    run("ip", "netns", "delete", name)

    @contextlib.contextmanager
    def listening(self, *ports: int) -> Iterator[None]:
        """Have the host listen on ports for the length of a block."""
        command = ["ip", "netns", "exec", self.host, sys.executable, "-IS", "-c", LISTEN, *map(str, ports)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
            yield
        finally:
            process.communicate()

    def connect(self, side: str, *attempts: tuple[str, str, int]) -> Any:
        """Connect from a side, each time from a source address to an address and port; return what came of it."""
        command = ("ip", "netns", "exec", side, sys.executable, "-IS", "-c", CONNECT)
        return json.loads(run(*command, send=json.dumps(attempts).encode()))


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Let this thread, and the processes that it starts, be in a namespace for the length of a block."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(path: Path) -> None:
        with path.open() as handle:
            if libc.setns(handle.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns {path}")

    with Path("/proc/thread-self/ns/net").open() as own:
        enter(NAMESPACES / namespace)
        try:
            yield
        finally:
            enter(Path(f"/proc/self/fd/{own.fileno()}"))
