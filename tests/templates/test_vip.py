"""The address of two gateways: real keepalived with the rendered configuration, in two network namespaces."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ansible_collections.gpufleet.core.plugins.module_utils.fleet import derive

from testbed.shell import provide, run, unpack
from tests.templates.network import Network
from tests.templates.render import PROJECT, render, role_variables

ADDRESSES = {"gw1": "10.98.0.1", "gw2": "10.98.0.2"}
VIP = "10.98.0.9"
PACKAGES = ("keepalived", "libnl-3-200", "libnl-genl-3-200", "libpci3", "libsnmp40", "libwrap0")

NGINX = """
# nginx, as keepalived asks it: the control socket, and /health with the status that a file has.
import pathlib, socketserver, sys, threading
from http.server import BaseHTTPRequestHandler
folder = pathlib.Path(sys.argv[1])
class Handler(BaseHTTPRequestHandler):
    def address_string(self): return "here"
    def log_message(self, *_): pass
    def do_GET(self):
        self.send_response(200 if self.path == "/digest" else int((folder / "health").read_text()))
        self.end_headers()
(folder / "control.sock").unlink(missing_ok=True)
control = socketserver.ThreadingUnixStreamServer(str(folder / "control.sock"), Handler)
(folder / "control.sock").chmod(0o666)
threading.Thread(target=control.serve_forever, daemon=True).start()
socketserver.ThreadingTCPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


def fleet(vip=None, gateways=("gw1", "gw2"), tls=None):
    """Two gateways with an address for both, in front of one GPU."""
    variables = {"gateway_vip": {"address": VIP, **(vip or {})}, "gateway_tls": tls}
    hostvars = {name: {"ansible_host": ADDRESSES[name], **variables} for name in gateways}
    service = {"route": "/tts/", "app": "app:app", "code": {"source": "."}, "conda_env": "tts", "client_limit": 1}
    groups = {"gpu_servers": ["gpu01"], "gateways": list(gateways)}
    hostvars["gpu01"] = {"ansible_host": "10.98.0.20", "gpu_count": 1}
    derived = derive({"tts": service}, groups, hostvars, conda_envs={"tts": {"lock": "."}})
    assert derived["faults"] == []
    return derived


def rendered(template, given, host="gw1", interface="eth0"):
    found = {"vip_interface": interface}
    variables = {**role_variables("gateway"), "inventory_hostname": host, "__preflight_host": found}
    return render("gateway", template, given, **variables)


@pytest.fixture(scope="module")
def keepalived():
    """The distribution's keepalived, unpacked: the command, with its environment."""
    provide({"curl": "curl", "ip": "iproute2"})
    folder = PROJECT / ".cache/keepalived"
    unpack(folder, *PACKAGES)
    libraries = [path for place in ("lib", "usr/lib") for path in (folder / place).glob("*-linux-gnu")]
    return ["env", f"LD_LIBRARY_PATH={os.pathsep.join(map(str, libraries))}", str(folder / "usr/sbin/keepalived")]


class Gateway:
    """keepalived and what it asks, in one of the namespaces; its files are below a folder."""

    def __init__(self, program, host, namespace, folder):
        self.program, self.host, self.namespace, self.folder = program, host, namespace, folder
        self.processes = {}
        folder.mkdir()
        (folder / "health").write_text("200")

    def write(self, given):
        """Render the configuration for it."""
        text = rendered("vip.conf.j2", given, self.host).replace(given["run_directory"], str(self.folder))
        (self.folder / "vip.conf").write_text(text)

    def start(self, name="keepalived"):
        """Start keepalived, or nginx."""
        pids = [f"--pid={self.folder}/pid", f"--vrrp_pid={self.folder}/vrrp.pid"]
        commands = {
            "keepalived": [*self.program, "--dont-fork", "--vrrp", f"--use-file={self.folder}/vip.conf", *pids],
            "nginx": [sys.executable, "-ISc", NGINX, str(self.folder), "9999"],
        }
        command = ["ip", "netns", "exec", self.namespace, *commands[name]]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.processes[name] = subprocess.Popen(command, **quiet, start_new_session=True)

    def stop(self, name="keepalived", how=signal.SIGTERM):
        """End keepalived, or nginx."""
        process = self.processes.pop(name)
        process.send_signal(how)
        process.wait()

    def die(self):
        """End keepalived and its child as a power failure would, with the address."""
        process = self.processes.pop("keepalived")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        run("ip", "-n", self.namespace, "address", "flush", "to", VIP)

    def has(self, address=VIP):
        """Whether it has the address."""
        return f" {address}/32 " in run("ip", "-n", self.namespace, "address")


@pytest.fixture
def gateways(keepalived):
    """Both, with all that keepalived asks; none has the address yet."""
    folder = Path("/run", f"gpufleet-vip-{os.getpid()}")  # the script's user can walk it
    network = Network([f"{ADDRESSES['gw1']}/24"], [f"{ADDRESSES['gw2']}/24"])
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        stack.enter_context(network.up())
        both = [
            Gateway(keepalived, host, namespace, folder / host)
            for host, namespace in zip(ADDRESSES, (network.host, network.outside))
        ]
        for gateway in both:
            gateway.write(fleet())
            gateway.start("nginx")
            stack.callback(lambda gateway=gateway: [gateway.stop(name) for name in list(gateway.processes)])
        yield both


def goes_to(gateway, *others, within):
    """The seconds until a gateway has the address and no other has it."""
    start = time.monotonic()
    while not gateway.has() or any(other.has() for other in others):
        assert time.monotonic() - start < within
        time.sleep(0.02)
    return time.monotonic() - start


def stays_with(gateway, *others, seconds=3):
    """Whether a gateway has the address all the while, and no other has it."""
    end = time.monotonic() + seconds
    while gateway.has() and not any(other.has() for other in others) and time.monotonic() < end:
        time.sleep(0.05)
    return time.monotonic() >= end


def both_running(gateways, seconds=3):
    """Start both, and see that the first keeps the address which it has alone at the beginning."""
    first, second = gateways
    first.start()
    goes_to(first, within=8)
    second.start()
    assert stays_with(first, second, seconds=seconds)
    return first, second


@pytest.mark.parametrize("given", [fleet(), fleet({"router_id": 7}), fleet(gateways=["gw2"])])
def test_the_configuration_is_one(keepalived, tmp_path, given):
    def judge(text):
        file = tmp_path / "vip.conf"
        file.write_text(text)
        command = role_variables("gateway")["__gateway_vip_check"].replace("{{ __gateway_vip_config }}", str(file))
        command = command.replace("keepalived", " ".join(keepalived), 1)
        return subprocess.run(["sh", "-c", command], capture_output=True, text=True)

    device = json.loads(run("ip", "-json", "route", "get", "192.0.2.1"))[0]["dev"]
    text = rendered("vip.conf.j2", given, interface=device)
    judged = judge(text)
    assert (judged.returncode, judged.stdout) == (0, "")
    for good, bad in (("priority 250", "priorty 250"), ("user www-data", "user nobody77"), (device, "eth77")):
        judged = judge(text.replace(good, bad))
        assert judged.returncode and judged.stdout, bad


def test_what_is_asked_is_what_clients_are_served_by():
    given = {"certificate": "given", "key": "given"}
    assert "http://127.0.0.1:9999/health" in rendered("vip.conf.j2", fleet())
    assert "https://127.0.0.1:9443/health" in rendered("vip.conf.j2", fleet(tls=given))


def test_a_dead_gateway_is_replaced_and_comes_back_without_taking_anything(gateways):
    first, second = both_running(gateways, seconds=5)  # it has found all to be well, and has the same priority
    # The source of its own connections stays its own address: by that the guards and firewalls know it.
    route = run("ip", "-n", first.namespace, "route", "get", "10.98.0.20")
    assert f"src {ADDRESSES['gw1']}" in route
    first.die()
    assert goes_to(second, first, within=3) > 1
    first.start()
    assert stays_with(second, first, seconds=5)


def test_a_dead_nginx_gives_the_address_away(gateways):
    first, second = both_running(gateways)
    first.stop("nginx", signal.SIGKILL)
    goes_to(second, first, within=3)
    first.start("nginx")
    assert stays_with(second, first)


def test_who_reaches_no_gpu_gives_the_address_to_one_that_does(gateways):
    first, second = gateways
    first.start()
    goes_to(first, within=8)
    (second.folder / "health").write_text("503")
    second.start()
    assert stays_with(first, second, seconds=5)
    (first.folder / "health").write_text("503")
    assert stays_with(first, second, seconds=5)  # with no GPU anywhere, clients are told so by one of them
    (second.folder / "health").write_text("200")
    goes_to(second, first, within=10)


def test_a_reload_moves_nothing_and_who_stops_hands_over_at_once(gateways):
    first, second = both_running(gateways)
    for gateway in gateways:
        with (gateway.folder / "vip.conf").open("a") as file:
            file.write("# changed\n")
        gateway.processes["keepalived"].send_signal(signal.SIGHUP)
    assert stays_with(first, second)
    first.stop()
    goes_to(second, first, within=1)


def test_one_that_left_the_inventory_hears_who_has_the_address(gateways):
    """It may come back to life with its old configuration; the other one's is for one gateway alone."""
    old, left = gateways
    left.write(fleet(gateways=["gw2"]))
    left.start()
    goes_to(left, within=8)
    old.start()
    assert stays_with(left, old, seconds=5)
