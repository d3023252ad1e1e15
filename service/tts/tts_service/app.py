"""The app as a server imports it; its engine is loaded by the import, which slot_guard does in the background."""

import os

from tts_service.service import create_app
from tts_service.settings import Settings

app = create_app(Settings.from_environment(os.environ))
