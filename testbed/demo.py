"""The end of `make demo`: show the fleet, have it speak a sentence, and say where both are to be found."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from testbed import PROJECT
from testbed.fleet import describe
from testbed.speech import ROUTE_TO_SPEECH, NotSpeech, seconds_of_speech, speak

INVENTORY = PROJECT / "inventory" / "demo"
GATEWAY = "http://127.0.0.1:9080"
SENTENCE = "你好,世界。"
RECORDING = PROJECT / ".cache" / "demo" / "hello.wav"


def table_of(fleet: dict[str, Any]) -> Table:
    """Return the fleet as a table, one row for each instance."""
    gateways = ", ".join(f"{gateway['host']} ({gateway['address']})" for gateway in fleet["gateways"])
    table = Table(title="The fleet", caption=f"{fleet['url']} on {gateways}: {fleet['capacity']} requests at once")
    for heading in ("host", "address", "GPU", "service", "program", "port", "slots"):
        table.add_column(heading, justify="right" if heading in ("GPU", "port", "slots") else "left")
    for instance in fleet["instances"]:
        keys = ("host", "address", "device", "service", "program", "port", "slots")
        table.add_row(*(str(instance[key]) for key in keys))
    return table


def main() -> int:
    """Show the demo fleet and have it speak."""
    # Without a terminal rich assumes 80 columns and folds the cells.
    console = Console(width=None if sys.stdout.isatty() else 110)
    fleet = describe(INVENTORY).fleet
    console.print(table_of(fleet))
    service = GATEWAY + fleet["services"]["cosyvoice2"]["route"]
    try:
        recording = speak(service, SENTENCE)
        seconds = seconds_of_speech(recording)
    except NotSpeech as error:
        print(f"demo: the cluster did not speak: {error}", file=sys.stderr)
        return 1
    RECORDING.parent.mkdir(parents=True, exist_ok=True)
    RECORDING.write_bytes(recording)
    print(f"URL    {service}{ROUTE_TO_SPEECH}")
    print(f"spoken {SENTENCE} ({seconds:.1f} s) -> {shown(RECORDING)}")
    return 0


def shown(file: Path) -> Path:
    """Return a path as short as it is understood from here."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


if __name__ == "__main__":
    sys.exit(main())
