"""The command line, on top of everything; nothing below imports it."""
