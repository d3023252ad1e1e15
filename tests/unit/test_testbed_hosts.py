"""Hosts as the inventory asks for them; what containers do with it is seen by every molecule scenario."""

import subprocess
from pathlib import Path

import pytest

from testbed import PROJECT
from testbed.hosts import NVIDIA_SMI, BedFailed, read_inventory, simulated_cards

UUID = "GPU-7c4b1d2e-5f60-4a8b-9c3d-2e1f0a9b8c7d"
INVENTORIES = [PROJECT / "inventory/demo", *sorted(PROJECT.glob("molecule/*/inventory"))]


def test_counted_cards_have_uuids_that_stay() -> None:
    cards = simulated_cards("demo/gpu01", {"gpu_count": "2"})
    assert len(set(cards)) == 2
    assert cards == simulated_cards("demo/gpu01", {"gpu_count": 2})
    assert not set(cards) & set(simulated_cards("demo/gpu02", {"gpu_count": 2}))


def test_a_card_left_out_is_still_in_the_machine() -> None:
    listed = simulated_cards("x", {"gpus": [0, {"device": "2", "slots": 3}]})
    assert listed == simulated_cards("x", {"gpu_count": 3})


def test_a_card_named_by_uuid_is_listed_by_it() -> None:
    assert simulated_cards("x", {"gpus": [0, UUID]})[1] == UUID
    assert simulated_cards("x", {"gpus": [{"device": UUID, "index": 3}, 0]})[3] == UUID


def test_a_host_without_cards_has_none() -> None:
    assert simulated_cards("x", {}) == ()


def test_the_simulated_driver_lists_cards_and_refuses_the_rest(tmp_path: Path) -> None:
    script = tmp_path / "nvidia-smi"
    (tmp_path / "cards").write_text(f"{UUID}\nGPU-2\n")
    script.write_text(NVIDIA_SMI.read_text().replace("/etc/nvidia-smi-simulated", str(tmp_path / "cards")))
    listing = subprocess.run(["sh", script, "-L"], capture_output=True, text=True, check=True).stdout
    assert listing.splitlines() == [f"GPU 0: Simulated GPU (UUID: {UUID})", "GPU 1: Simulated GPU (UUID: GPU-2)"]
    refused = subprocess.run(["sh", script, "-q"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "simulated" in refused.stderr


@pytest.mark.parametrize("inventory", INVENTORIES, ids=lambda inventory: str(inventory.relative_to(PROJECT)))
def test_inventories_of_the_project_ask_for_a_test_bed(inventory: Path) -> None:
    bed = read_inventory(inventory)
    assert {host.name.rstrip("12") for host in bed.hosts if not host.cards} == {"gw"}
    assert len({host.address for host in bed.hosts}) == len(bed.hosts)


def test_beds_can_be_up_side_by_side() -> None:
    beds = [read_inventory(inventory) for inventory in INVENTORIES]
    assert len({bed.fleet for bed in beds}) == len({bed.subnet for bed in beds}) == len(beds)


def test_a_missing_variable_is_named_with_its_host(tmp_path: Path) -> None:
    (tmp_path / "hosts.yml").write_text("gateways: {hosts: {gw: {ansible_host: 10.0.0.1, testbed_fleet: x}}}\n")
    with pytest.raises(BedFailed, match="host gw has no variable testbed_subnet"):
        read_inventory(tmp_path)
