"""Notes Ctrl-C, of which only the main thread of a command gets an exception."""

received: list[int] = []
"""The signals so far, where `cmscale.commands.ending` handles them."""
