"""Command lines made from dataclasses: an option for each field, YAML files, one-line errors."""

from bonsai_fast.command_line.command import Command, taken, value_of
from bonsai_fast.command_line.config_file import save_config
from bonsai_fast.command_line.entry import FILES, Entry, argument, entries_of, entry

__all__ = [
    "FILES",
    "Command",
    "Entry",
    "argument",
    "entries_of",
    "entry",
    "save_config",
    "taken",
    "value_of",
]
