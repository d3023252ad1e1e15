"""Command line: `python3 -m fleet_agent --config FILE`. Runs until it is killed; the flags stay as they are then."""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import sys
from pathlib import Path

from fleet_agent.agent import Agent
from fleet_agent.config import ConfigError, ConfigFile


def main() -> int:
    """Run the agent; the exit code is 2 where its configuration cannot be used."""
    parser = argparse.ArgumentParser(prog="fleet_agent", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="JSON file, read again when it changes")
    options = parser.parse_args()
    logging.basicConfig(format="[%(asctime)s] [%(levelname)s] %(message)s", level=logging.INFO, stream=sys.stderr)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection to each instance at a time
    try:
        agent = Agent(ConfigFile(options.config))
    except ConfigError as error:
        logging.error("%s", error)
        return 2
    asyncio.run(agent.run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
