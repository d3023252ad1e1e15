"""The reference text-to-speech service: text in, WAV out, on the route of the article's cluster."""
