"""The fleet page in a browser, while clients ask and an operator drains a card."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

from tests.browser import chromium

from ..operations import Operator

TAKEN = "document.querySelectorAll('.slots:not(.places) .taken').length"


@pytest.mark.usefixtures("full_load")
def test_a_browser_sees_the_load_and_a_drain_within_two_seconds(
    operator: Operator, fleet: dict[str, Any], on: Callable[[str], Host]
) -> None:
    gateway, instance = fleet["gateways"][0], fleet["instances"][-1]["id"]
    state = f"document.querySelector('[data-instance={instance}] .state')?.dataset.state"
    with chromium(gateway["address"]) as browser:
        browser.visit(f"{gateway['url']}/cluster/")
        browser.wait(f"return {TAKEN} > {fleet['capacity'] // 2}", 20)
        with subprocess.Popen(operator.command("drain", target=instance), stdout=subprocess.DEVNULL) as drain:
            browser.wait(f"return ['draining', 'drained'].includes({state})", 60)
            shown = time.time()  # the gateway, a container, has the same clock
            assert drain.wait(120) == 0
        flag = on(gateway["host"]).check_output("stat -c %%.9Y /var/lib/gpufleet-gateway/drain/%s", instance)
        assert shown - float(flag) < 2
        changes = browser.run("return document.getElementById('changes').innerText")
        assert f"{instance} drained" in changes
        operator.play("undrain", target=instance)
        browser.wait(f"return {state} == 'ready'", 10)
        assert browser.complaints() == []
