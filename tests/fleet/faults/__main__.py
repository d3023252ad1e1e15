"""Run the fault matrix: `python -m tests.fleet.faults --list`."""

import sys

if __name__ == "__main__":
    # Not at the top: the processes that render templates import this module too, and Ansible finds a collection's
    # filters only where no import of it went before.
    from .command import main

    sys.exit(main())
