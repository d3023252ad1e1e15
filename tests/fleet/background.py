"""What goes on beside a test."""

import threading
from abc import ABC, abstractmethod
from typing import Self


class Background(ABC):
    """A thread that works for the length of a `with` block, which ends when the work has seen `ending`."""

    def __init__(self) -> None:
        self.ending = threading.Event()
        self._thread = threading.Thread(target=self.work)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self._thread.join()

    @abstractmethod
    def work(self) -> None:
        """Run until `ending` is set, and bring to its end what was begun."""
