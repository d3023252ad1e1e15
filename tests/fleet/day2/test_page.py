"""The fleet page in a browser, while clients ask and an operator drains a card.

The pictures are those in docs/; with GPUFLEET_PICTURES=1 they are written anew.
"""

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

from testbed import PROJECT
from tests.browser import chromium

from ..operations import Operator

PICTURES = {"en": "fleet-page.png", "zh": "fleet-page.zh-CN.png"}
"""By the language that they are in."""
FADED_SECONDS = 0.4
"""What the colours of slots need at most."""
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
        browser.look(1200, 600, scale=1.5)
        for language, picture in PICTURES.items():
            browser.run(f"document.querySelector('[data-language={language}]').click()")
            time.sleep(FADED_SECONDS)
            png = browser.screenshot()
            assert png.startswith(b"\x89PNG") and len(png) > 50_000
            if os.environ.get("GPUFLEET_PICTURES"):
                (PROJECT / "docs" / picture).write_bytes(png)
        operator.play("undrain", target=instance)
        browser.wait(f"return {state} == 'ready'", 10)
        assert browser.complaints() == []
