"""Make an API key: python -m tools.apikey new LABEL. Prints the key, which is kept nowhere, and its hash to paste."""

from __future__ import annotations

import argparse
import secrets
import sys

from ansible_collections.gpufleet.core.plugins.module_utils.entrance import hash_of, is_label

SECRET_BYTES = 32
ID_BYTES = 3

TEXT = """\
The key, for its holder alone. It is kept nowhere and cannot be shown again:

{key}

For the inventory; a label may have several hashes at a time:

api_keys:
  {label}:
    hashes:
      - {hash}
"""


def new_key(label: str) -> str:
    """Return a key that nobody has had before."""
    return f"{label}.{secrets.token_hex(ID_BYTES)}.{secrets.token_urlsafe(SECRET_BYTES)}"


def main(arguments: list[str]) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.apikey", description="Make keys for the gateway's clients.")
    commands = parser.add_subparsers(required=True)
    new = commands.add_parser("new", help="print a new key and its hash")
    new.add_argument("label", help="whom the key is for: a-z, 0-9, _ and -, in logs and in the inventory")
    label = parser.parse_args(arguments).label
    if not is_label(label):
        print(f"apikey: {label!r} is no label: use a-z, 0-9, _ and -, 32 at most, from a letter on", file=sys.stderr)
        return 1
    key = new_key(label)
    print(TEXT.format(key=key, label=label, hash=hash_of(key)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
