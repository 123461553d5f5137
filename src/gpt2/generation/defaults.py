"""Defaults of text generation: the same in Python, in the commands and in the server. Imports no torch."""

MAX_NEW_TOKENS = 100  # of each text; a chat completion of the server has the rest of the context instead
TEMPERATURE = 1.0
TOP_K = 50
