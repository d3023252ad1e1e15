"""A fleet that begins to speak TLS and to ask for keys, changes one under load, and is open to everybody again."""

import ssl
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from ansible_collections.gpufleet.core.plugins.module_utils.entrance import hash_of
from testinfra.host import Host

from tests.certificate import self_signed
from tools.apikey import new_key

from ..load import SteadyLoad, post_at_once
from ..operations import Inventory, Operator

TEXT = {"text": "密钥"}
IN_FLIGHT = 4


def test_a_certificate_and_keys_come_change_under_load_and_go(
    operator: Operator,
    inventory: Inventory,
    fleet: dict[str, Any],
    on: Callable[[str], Host],
    url: Callable[..., str],
    client_addresses: list[str],
    tmp_path: Path,
) -> None:
    gateway = fleet["gateways"][0]
    certificate = self_signed(tmp_path, gateway["address"])
    plain = url("audio-generate")
    secure = plain.replace(f"http://{gateway['address']}:9999/", f"https://{gateway['address']}:9443/")
    old, new = new_key("studio"), new_key("studio")

    def statuses(url: str, count: int, key: str = "") -> Counter[int | None]:
        return Counter(answer.status for answer in post_at_once(url, client_addresses[:count], TEXT, key=key))

    def apply(*keys: str) -> None:
        with inventory.edited(inventory.variables) as variables:
            variables["gateway_tls"] = {name: str(certificate / f"{name}.pem") for name in ("certificate", "key")}
            variables["api_keys"] = {"studio": {"hashes": [hash_of(key) for key in keys], "in_flight": IN_FLIGHT}}
        operator.play("site", "--tags", "gateway")

    apply(old)
    trusted = ssl.create_default_context(cafile=certificate / "certificate.pem")
    assert httpx.get(secure, verify=trusted, trust_env=False).status_code == 401
    assert statuses(plain, 1) == {308: 1}
    assert statuses(secure, 1) == {401: 1}
    redirect = httpx.post(f"{secure}/", headers={"X-API-Key": old}, verify=trusted, trust_env=False)
    assert redirect.headers["location"] == secure
    # One holder at many addresses is one client.
    assert statuses(secure, IN_FLIGHT + 3, old) == {200: IN_FLIGHT, 503: 3}

    with SteadyLoad(secure, client_addresses[:IN_FLIGHT], TEXT, key=old) as load:
        apply(old, new)
        assert statuses(secure, 1, new_key("studio")) == {401: 1}
    assert Counter(answer.status for answer in load.answers) == {200: len(load.answers)}
    assert statuses(secure, 1, new) == {200: 1}

    inventory.restore()
    operator.play("site", "--tags", "gateway")
    assert statuses(plain, 1) == {200: 1}
    host = on(gateway["host"])
    assert not host.socket("tcp://0.0.0.0:9443").is_listening
    assert host.run("find /etc/nginx -name '*.pem' -o -name 'api_keys*'").stdout == ""
    assert host.run("grep -rl %s /var/log /etc", old.rpartition(".")[2]).stdout == ""
