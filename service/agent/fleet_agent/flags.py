"""Flag files: one raised for every instance that gets no request. The gateway looks only at whether it is there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def names(directory: Path) -> set[str]:
    """Names of the files in a directory; OSError where it cannot be read."""
    with os.scandir(directory) as entries:
        return {entry.name for entry in entries}


class Flags:
    """The flags of one directory, brought to what is wanted file by file."""

    def __init__(self, directory: Path) -> None:
        """Take over the flags that are raised there; OSError where they cannot be read."""
        self.directory = directory
        self.texts: dict[str, str] = {}
        """Text by name of each flag that is raised."""
        for name in names(directory):
            try:
                self.texts[name] = (directory / name).read_text(encoding="utf-8", errors="replace")
            except OSError:
                self.texts[name] = ""  # raised all the same

    def apply(self, wanted: Mapping[str, str]) -> set[str]:
        """Raise the flags `wanted` (text by name) and clear all others, those of unknown names included.

        One that cannot be raised or cleared stays as it is and keeps none of the others from their change.

        :returns: why some could not be changed, in the system's words.
        """
        try:
            present = names(self.directory)
        except OSError as error:
            return {str(error.strerror)}
        faults = set()
        for name in present - wanted.keys():
            try:
                (self.directory / name).unlink()
                self.texts.pop(name, None)
            except OSError as error:
                faults.add(str(error.strerror))
        for name, text in wanted.items():
            if name in present and self.texts.get(name) == text:
                continue
            try:
                self._raise(name, text)
            except OSError as error:
                faults.add(str(error.strerror))
        return faults

    def _raise(self, name: str, text: str) -> None:
        """Put a whole flag in its place at once. What a failure leaves behind is cleared by the next `apply`."""
        unfinished = self.directory / f".{name}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self.directory / name)
        self.texts[name] = text
