"""Run test layers one after the other, each by its make target, and sum them up.

A failed layer does not stop the next: what it says is worth having too.
"""

import os
import subprocess
import sys
import time


def main(layers: list[str]) -> int:
    """Run the layers named on the command line; return how the program should end."""
    quiet = {} if sys.stdout.isatty() else {"NO_COLOR": "1", "COLUMNS": "140"}
    results: dict[str, tuple[bool, float]] = {}
    for layer in layers:
        print(f"\n===== {layer} =====", flush=True)
        began = time.monotonic()
        done = subprocess.run(("make", "--no-print-directory", layer), stdin=subprocess.DEVNULL, env=os.environ | quiet)
        results[layer] = (done.returncode == 0, time.monotonic() - began)
    print("\n===== all layers =====")
    for layer, (passed, seconds) in results.items():
        print(f"{layer:<20} {'passed' if passed else 'FAILED'} {seconds:7.1f} s")
    failed = sum(not passed for passed, _ in results.values())
    print(f"layers: {len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
