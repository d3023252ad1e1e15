"""A fleet that begins to be watched, sees a card go, and is watched no more."""

import json
import re
from collections.abc import Callable
from typing import Any

from testinfra.host import Host

from ..operations import Inventory, Operator, wait_until

SETTINGS = {"monitoring_scrape_interval": "2s", "monitoring_alert_for": {"GpuGone": "1s"}}
CARDS = "/etc/nvidia-smi-simulated"
LEFT = r"find / -xdev -type f -path '*gpufleet*' \( -path '*prometheus*' -o -path '*mtail*' -o -path '*gpu?metrics*' \)"
PORTS = "ss -ltn | grep -E ':(9090|9100|9112|9113|9115|3903) '"


class Prometheus:
    """The one on a host, which answers that host alone."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def ask(self, path: str) -> Any:
        """What it tells; nothing while it does not answer."""
        ask = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())"
        answer = self.host.run("python3 -c %s %s", ask, f"http://127.0.0.1:9090/api/v1/{path}")
        return json.loads(answer.stdout)["data"] if answer.rc == 0 else {}

    def down(self) -> list[str]:
        """Targets that were not had, and why."""
        targets = self.ask("targets").get("activeTargets")
        if not targets:
            return ["no target at all"]
        return [f"{one['scrapeUrl']}: {one['lastError']}" for one in targets if one["health"] != "up"]

    def firing(self, alert: str) -> list[dict[str, str]]:
        """Labels of an alert as often as it fires."""
        alerts = self.ask("alerts").get("alerts", [])
        return [one["labels"] for one in alerts if one["state"] == "firing" and one["labels"]["alertname"] == alert]


def test_a_card_that_goes_is_told_and_nothing_stays_when_nobody_watches(
    operator: Operator, inventory: Inventory, fleet: dict[str, Any], on: Callable[[str], Host]
) -> None:
    gateway = fleet["gateways"][0]["host"]
    prometheus = Prometheus(on(gateway))
    with inventory.edited("hosts.yml") as groups:
        groups["monitoring"] = {"hosts": {gateway: {}}}
    operator.play("site", **SETTINGS)
    wait_until(lambda: not prometheus.down(), 60, prometheus.down)
    told = {one["labels"]["host"] for one in prometheus.ask("targets")["activeTargets"]}
    assert told == {gateway, *fleet["hosts"]}

    again = operator.play("site", "--tags", "monitoring", **SETTINGS)
    assert set(re.findall(r"^\S+ +: ok=\d+ +changed=(\d+)", again, flags=re.MULTILINE)) == {"0"}

    reach = "timeout 5 bash -c '</dev/tcp/%s/9100'"
    for watched, other in (("gpu01", "gpu02"), ("gpu02", "gpu01")):
        address = fleet["hosts"][watched]["address"]
        assert on(gateway).run(reach % address).rc == 0
        assert "Connection refused" in on(other).run(reach % address).stderr

    cards = on("gpu02").check_output("cat %s", CARDS)
    on("gpu02").check_output("sed -i '$d' %s", CARDS)
    wait_until(lambda: bool(prometheus.firing("GpuGone")), 60)
    (alert,) = prometheus.firing("GpuGone")
    assert (alert["host"], alert["device"], alert["severity"]) == ("gpu02", "1", "critical")
    on("gpu02").check_output("printf '%%s\\n' %s >%s", cards, CARDS)
    wait_until(lambda: not prometheus.firing("GpuGone"), 60)

    inventory.restore()
    operator.play("site")
    for host in (gateway, *fleet["hosts"]):
        assert [on(host).run(look).stdout for look in (LEFT, PORTS)] == ["", ""], host
