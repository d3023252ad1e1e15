"""The service's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_ROUTE = "/AIVoice/TTS/CosyVoice2/"


@dataclass(frozen=True)
class Settings:
    """The settings of the service; `from_environment` reads them from TTS_*."""

    route: str = DEFAULT_ROUTE
    """Path prefix, begins and ends with /."""
    engine: str = "espeak"
    """espeak, simulated, or package.module:Class."""
    max_characters: int = 1000
    """Longest text that is spoken."""
    ledger: str = ""
    """File to which the start and the end of every inference are appended; empty for none."""
    instance: str = ""
    """Id of the instance in the fleet, for the ledger."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """Read TTS_ROUTE, TTS_ENGINE, TTS_MAX_CHARACTERS, TTS_LEDGER and the guard's SLOT_GUARD_INSTANCE."""
        return cls(
            route=environ.get("TTS_ROUTE", cls.route),
            engine=environ.get("TTS_ENGINE", cls.engine),
            max_characters=int(environ.get("TTS_MAX_CHARACTERS", cls.max_characters)),
            ledger=environ.get("TTS_LEDGER", cls.ledger),
            instance=environ.get("SLOT_GUARD_INSTANCE", cls.instance),
        )
