"""Run one of the benchmarks: `python -m bench gateway --quick`."""

import importlib
import sys

BENCHMARKS = ("gateway", "rollout")


def main(arguments: list[str]) -> int:
    """Hand the command line over to the benchmark that its first word names."""
    if not arguments or arguments[0] not in BENCHMARKS:
        print(f"usage: python -m bench {{{','.join(BENCHMARKS)}}} …", file=sys.stderr)
        return 2
    # Not imported above: the processes that render templates import this module too, and Ansible finds a collection's
    # filters only where no import of it went before.
    status: int = importlib.import_module(f"bench.{arguments[0]}.run").main(arguments[1:])
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
