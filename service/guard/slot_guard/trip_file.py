"""The memory of a trip beyond the process that was taken out. No fault of the file keeps an instance from starting."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from slot_guard.breaker import Trip

logger = logging.getLogger("slot_guard")


class TripFile:
    """One instance's file; a trip of another release than `version` says nothing about this one and is ignored."""

    def __init__(self, directory: Path | None, instance: str, version: str) -> None:
        """Keep the file in `directory`; nothing is kept when that is None."""
        self._path = directory / f"{instance or 'slot_guard'}.trip.json" if directory else None
        self._version = version

    def load(self) -> Trip | None:
        """The trip of the process before, or None."""
        if self._path is None:
            return None
        try:
            kept = json.loads(self._path.read_bytes())
            trip = Trip(str(kept["reason"]), int(kept["count"]), float(kept["at"]))
            if trip.count < 1 or not math.isfinite(trip.at):
                raise ValueError(f"no trip: {kept}")
            return trip if kept["version"] == self._version else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            logger.warning("%s is ignored, so there is no back-off: %r", self._path, error)
            return None

    def save(self, trip: Trip) -> None:
        """Keep a trip for the next process."""
        if self._path is None:
            return
        text = json.dumps({"reason": trip.reason, "count": trip.count, "at": trip.at, "version": self._version})
        draft = self._path.with_name(f"{self._path.name}.new")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(self._path)
        except OSError as error:
            logger.warning("the next start will know of no back-off: %r", error)

    def clear(self) -> None:
        """Forget the trip."""
        if self._path is None:
            return
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the next start will still know of the last trip: %r", error)
