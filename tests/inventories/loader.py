"""Read an inventory the way Ansible does and derive the fleet from it."""

from pathlib import Path
from typing import Any

from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.vars.manager import VariableManager
from ansible_collections.gpufleet.core.plugins.module_utils.fleet import derive

PROJECT = Path(__file__).parents[2]


def derive_from(inventory: Path) -> dict[str, Any]:
    """Return the fleet of the inventory at a path, faults included."""
    loader = DataLoader()
    loader.set_basedir(str(PROJECT / "playbooks"))  # as for the plays that site.yml imports
    manager = InventoryManager(loader=loader, sources=[str(inventory)])
    variables = VariableManager(loader=loader, inventory=manager)
    hostvars = {host.name: variables.get_vars(host=host) for host in manager.get_hosts()}
    common = variables.get_vars(host=manager.localhost or manager.get_hosts()[0])
    return derive(
        common.get("services"),
        manager.get_groups_dict(),
        hostvars,
        conda_envs=common.get("conda_envs"),
        port=common.get("fleet_port", 9999),
    )
