"""The rendered firewall in a real kernel, in a network namespace; systemd alone is simulated."""

import contextlib
import errno
import json
import subprocess
import sys

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpufleet.core.plugins.module_utils.fleet import derive
from ansible_collections.gpufleet.core.plugins.modules import firewall

from testbed.shell import provide
from tests.templates.network import Network, inside
from tests.templates.render import render, role_variables

HOST, HOST6 = "10.99.0.1", "fd99::1"
GATEWAY, GATEWAY6 = "10.99.0.100", "fd99::64"
STRANGER, STRANGER6 = "10.99.0.66", "fd99::66"
WATCHER, WATCHER6 = "10.99.0.9", "fd99::9"
INSTANCE, METRICS, OTHER = 12321, 9100, 8080

SYSTEMCTL = """#!/bin/sh
# systemctl, simulated: one unit, whose Exec lines it runs, and whether it is enabled and active.
cd {folder}
execute() {{ $(sed -n "s|^$1=-\\?/usr/sbin/||p" {unit}); }}
case "$*" in
daemon-reload) ;;
is-enabled*) test -e enabled ;;
enable*) touch enabled ;;
reload-or-restart*) if test -e active; then execute ExecReload; else execute ExecStart; fi && touch active ;;
disable\\ --now*) execute ExecStop; rm -f enabled active ;;
*) echo "systemctl, simulated: $*?" >&2; exit 1 ;;
esac
"""


@pytest.fixture(scope="module", autouse=True)
def programs():
    provide({"nft": "nftables", "ip": "iproute2"})


@pytest.fixture
def network():
    near = [f"{address}/24" for address in (GATEWAY, STRANGER, WATCHER)]
    near += [f"{address}/64" for address in (GATEWAY6, STRANGER6, WATCHER6)]
    with Network([f"{HOST}/24", f"{HOST6}/64"], near).up() as up:
        yield up


def fleet(gateways=(GATEWAY, GATEWAY6), gpu_count=1, monitoring=()):
    hostvars = {"gpu01": {"ansible_host": HOST, "gpu_count": gpu_count}}
    hostvars |= {f"gateway{number}": {"ansible_host": address} for number, address in enumerate(gateways)}
    hostvars |= {f"watcher{number}": {"ansible_host": address} for number, address in enumerate(monitoring)}
    service = {"route": "/tts/", "app": "app:app", "code": {"source": "."}, "conda_env": "tts", "client_limit": 1}
    groups = {"gpu_servers": ["gpu01"], "gateways": [name for name in hostvars if name.startswith("gateway")]}
    groups["monitoring"] = [name for name in hostvars if name.startswith("watcher")]
    derived = derive({"tts": service}, groups, hostvars, conda_envs={"tts": {"lock": "."}})
    assert derived["faults"] == []
    return derived


def rendered(template, given, **found):
    variables = {**role_variables("gpu_workers"), "__preflight_host": found}
    return render("gpu_workers", template, given, inventory_hostname="gpu01", **variables)


class Host:
    """The module on the host of a network; its files are below a folder."""

    def __init__(self, network, folder, monkeypatch, capsys):
        self.network, self.folder, self.capsys = network, folder, capsys
        (folder / "systemctl").write_text(SYSTEMCTL.format(folder=folder, unit=firewall.UNIT.name))
        (folder / "systemctl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin")
        self.rules = folder / firewall.RULES.name
        monkeypatch.setattr(firewall, "RULES", self.rules)
        monkeypatch.setattr(firewall, "UNIT", folder / firewall.UNIT.name)

    def apply(self, rules, check=False):
        """Call the module; the result has ``failed`` where it failed."""
        unit = rendered("firewall.service.j2", fleet()).replace("/etc/gpufleet-firewall.nft", str(self.rules))
        arguments = {"rules": rules, "unit": unit, "_ansible_check_mode": check, "_ansible_diff": True}
        self.capsys.readouterr()
        with inside(self.network.host), patch_module_args(arguments), contextlib.suppress(SystemExit):
            firewall.main()
        return json.loads(self.capsys.readouterr().out)

    def nft(self, *words):
        """Let an operator call nft."""
        with inside(self.network.host):
            return subprocess.run(["nft", *words], check=True, capture_output=True, text=True).stdout

    def files(self):
        """Names of what the module leaves behind."""
        return {path.name for path in self.folder.iterdir()} - {"systemctl"}


@pytest.fixture
def host(network, tmp_path, monkeypatch, capsys):
    return Host(network, tmp_path, monkeypatch, capsys)


def test_only_gateways_and_the_host_itself_reach_the_instances(host):
    network = host.network
    with network.listening(INSTANCE, OTHER):
        assert network.connect(network.outside, (STRANGER, HOST, INSTANCE)) == ["connected"]
        assert host.apply(rendered("firewall.nft.j2", fleet()))["changed"]
        assert (
            network.connect(
                network.outside,
                (GATEWAY, HOST, INSTANCE),
                (GATEWAY6, HOST6, INSTANCE),
                (STRANGER, HOST, OTHER),
                (STRANGER6, HOST6, OTHER),
                (STRANGER, HOST, INSTANCE),
                (STRANGER6, HOST6, INSTANCE),
            )
            == ["connected"] * 4 + ["ConnectionRefusedError"] * 2
        )
        own = [("127.0.0.1", "127.0.0.1", INSTANCE), (HOST, HOST, INSTANCE), ("::1", "::1", INSTANCE)]
        assert network.connect(network.host, *own) == ["connected"] * 3


def test_a_program_that_is_to_leave_is_guarded_until_it_has_left(host):
    network = host.network
    with network.listening(INSTANCE, OTHER):
        host.apply(rendered("firewall.nft.j2", fleet(), program_ports=[INSTANCE, OTHER]))
        attempts = [(source, HOST, port) for source in (GATEWAY, STRANGER) for port in (INSTANCE, OTHER)]
        assert network.connect(network.outside, *attempts) == ["connected"] * 2 + ["ConnectionRefusedError"] * 2
        host.apply(rendered("firewall.nft.j2", fleet(), program_ports=[INSTANCE]))
        assert network.connect(network.outside, (STRANGER, HOST, OTHER)) == ["connected"], "it is not ours any more"


def test_metrics_are_told_to_monitoring_hosts_alone_who_reach_no_instance(host):
    network = host.network
    attempts = [(source, HOST, port) for source in (GATEWAY, STRANGER, WATCHER) for port in (METRICS, INSTANCE)]
    attempts += [(WATCHER6, HOST6, METRICS), (STRANGER6, HOST6, METRICS)]
    refused, let_in = "ConnectionRefusedError", "connected"
    with network.listening(INSTANCE, METRICS):
        host.apply(rendered("firewall.nft.j2", fleet(monitoring=(WATCHER, WATCHER6))))
        told = network.connect(network.outside, *attempts)
        assert told == [refused, let_in, refused, refused, let_in, refused, let_in, refused]
        assert network.connect(network.host, ("127.0.0.1", "127.0.0.1", METRICS)) == [let_in]
        host.apply(rendered("firewall.nft.j2", fleet()))
        assert network.connect(network.outside, (STRANGER, HOST, METRICS)) == [let_in], "it is not ours any more"


def test_connections_of_the_host_from_such_a_port_are_left_alone(host):
    """A port of an instance may, before that starts, be the near end of what the host asks of others."""
    host.apply(rendered("firewall.nft.j2", fleet()))
    network = host.network
    with inside(network.outside):
        listener = subprocess.Popen(
            [sys.executable, "-c", f"import socket; socket.create_server(({STRANGER!r}, {OTHER})).accept()"]
        )
    try:
        with inside(network.host):
            code = (
                "import socket, time\n"
                "for _ in range(100):\n"
                "    try:\n"
                f"        socket.create_connection(({STRANGER!r}, {OTHER}), 2, ({HOST!r}, {INSTANCE}))\n"
                "        break\n"
                "    except ConnectionRefusedError:\n"
                "        time.sleep(0.02)\n"
                "else:\n"
                "    raise SystemExit('refused')\n"
            )
            assert subprocess.run([sys.executable, "-c", code]).returncode == 0
        assert listener.wait(5) == 0
    finally:
        listener.kill()
        listener.wait()


def test_rules_of_others_stay_and_have_the_last_word(host):
    host.nft("add table inet theirs")
    host.nft("add chain inet theirs input { type filter hook input priority 10 ; policy accept ; }")
    host.nft(f"add rule inet theirs input ip saddr {GATEWAY} tcp dport {INSTANCE} drop")
    before = host.nft("list", "table", "inet", "theirs")
    host.apply(rendered("firewall.nft.j2", fleet()))
    with host.network.listening(INSTANCE):
        assert host.network.connect(host.network.outside, (GATEWAY, HOST, INSTANCE)) == ["TimeoutError"]
    host.apply("")
    assert host.nft("list", "ruleset") == before


def test_a_second_run_changes_nothing_and_a_lost_table_comes_back(host):
    rules = rendered("firewall.nft.j2", fleet())
    planned = host.apply(rules, check=True)
    assert (planned["changed"], host.files()) == (True, set())
    assert {diff["after_header"].rsplit("/", 1)[1] for diff in planned["diff"]} == {
        "gpufleet-firewall.nft",
        "gpufleet-firewall.service",
    }
    assert host.apply(rules)["changed"]
    for check in (False, True):
        assert not host.apply(rules, check)["changed"]
    host.nft("flush", "ruleset")
    assert host.apply(rules, check=True)["changed"]
    assert host.apply(rules)["changed"]
    assert "newcomers" in host.nft("list", "table", "inet", "gpufleet")


def test_another_gateway_and_another_card_replace_the_whole_table(host):
    host.apply(rendered("firewall.nft.j2", fleet()))
    host.apply(rendered("firewall.nft.j2", fleet(gateways=(STRANGER,), gpu_count=2)))
    network = host.network
    with network.listening(INSTANCE, INSTANCE + 1):
        attempts = [(source, HOST, port) for source in (GATEWAY, STRANGER) for port in (INSTANCE, INSTANCE + 1)]
        assert network.connect(network.outside, *attempts) == ["ConnectionRefusedError"] * 2 + ["connected"] * 2
    assert GATEWAY not in host.nft("list", "ruleset")


def test_opting_out_leaves_nothing_behind(host):
    assert not host.apply("")["changed"]
    host.apply(rendered("firewall.nft.j2", fleet()))
    assert host.apply("", check=True)["changed"]
    assert host.files() == {"gpufleet-firewall.nft", "gpufleet-firewall.service", "enabled", "active"}
    assert host.apply("")["changed"]
    assert (host.files(), host.nft("list", "ruleset")) == (set(), "")
    assert not host.apply("")["changed"]


def test_rules_that_nft_refuses_change_nothing(host):
    rules = rendered("firewall.nft.j2", fleet())
    host.apply(rules)
    before = host.nft("list", "ruleset"), host.rules.read_text()
    for check in (True, False):
        refused = host.apply(rules.replace("reject with tcp reset", "reject with flowers"), check)
        assert refused["failed"] and "flowers" in refused["msg"]
    assert (host.nft("list", "ruleset"), host.rules.read_text()) == before


def test_rules_that_do_not_come_into_force_are_taken_back(host):
    rules = rendered("firewall.nft.j2", fleet())
    failed = host.apply(rules.replace("@RULES_DIGEST@", "something else"))
    assert "not in force" in failed["msg"]
    assert (host.files(), host.nft("list", "ruleset")) == (set(), "")
    host.apply(rules)
    before = host.nft("list", "ruleset")
    assert host.apply(rules.replace("@RULES_DIGEST@", "something else"))["failed"]
    assert host.nft("list", "ruleset") == before
    assert not host.apply(rules)["changed"]


def test_a_disk_that_is_full_leaves_the_rules_in_force(host, monkeypatch):
    host.apply(rendered("firewall.nft.j2", fleet()))
    before = host.nft("list", "ruleset"), host.rules.read_text()

    def refuse(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(firewall, "write", refuse)
    refused = host.apply(rendered("firewall.nft.j2", fleet(gateways=(GATEWAY,))))
    assert refused["msg"].startswith("The firewall is as it was. [Errno 28] No space left on device")
    assert "failed too" not in refused["msg"]
    assert (host.nft("list", "ruleset"), host.rules.read_text()) == before


def test_a_container_without_the_right_to_is_told_what_to_do(host, monkeypatch):
    """The shell drops the capability that containers lack by default."""
    nft = host.folder / "nft"
    nft.write_text('#!/bin/sh\nexec setpriv --bounding-set=-net_admin --inh-caps=-net_admin /usr/sbin/nft "$@"\n')
    nft.chmod(0o755)
    refused = host.apply(rendered("firewall.nft.j2", fleet()))
    assert refused["failed"] and "NET_ADMIN" in refused["msg"] and "gpu_workers_firewall: false" in refused["msg"]
    assert host.files() == {"nft"}
    assert not host.apply("")["changed"]
