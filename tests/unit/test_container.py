"""The compose file and what goes with it, as the gateway's role renders them."""

import yaml

from tests.templates.render import render
from tests.unit.test_fleet import fleet_of, service


def compose(container, **entrance):
    hosts = {"gpu01": {"gpu_count": 1, "ansible_host": "10.0.0.1"}}
    fleet = fleet_of(hosts, {"tts": service()}, gateway={"gateway_container": container, **entrance})
    assert fleet["faults"] == []
    return yaml.safe_load(render("gateway", "docker-compose.yml.j2", fleet, __gateway_image="ours:1"))["services"][
        "nginx"
    ]


def test_the_article_s_port_leads_to_the_container_s():
    service = compose({"base_image": "debian:bookworm", "publish": 9080})
    assert (service["network_mode"], service["ports"]) == ("bridge", ["0.0.0.0:9080:9999"])
    assert (service["image"], service["build"]["context"]) == ("ours:1", ".")


def test_ports_of_tls_are_the_same_inside_and_outside():
    tls = {"certificate": "c.pem", "key": "k.pem"}
    service = compose({"image": "nginx", "publish": 9080}, gateway_tls=tls)
    assert service["ports"] == ["0.0.0.0:9080:9999", "0.0.0.0:9443:9443"]
    assert "build" not in service


def test_without_a_published_port_the_network_is_the_host_s():
    service = compose({"image": "nginx"})
    assert service["network_mode"] == "host"
    assert "ports" not in service


def test_every_path_is_the_same_inside_and_outside():
    volumes = [volume.split(":") for volume in compose({"image": "nginx"})["volumes"]]
    assert all(outside == inside for outside, inside, *_ in volumes)
    assert "/var/lib/gpufleet-gateway" in [outside for outside, *_ in volumes]
