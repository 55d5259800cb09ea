"""How the help of a command looks: two columns, an empty line between groups of options."""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

# of the left column, in characters
LABEL_WIDTH = 24


class HelpPage:
    """A formatter for cyclopts; its own ones take a third more lines."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: Any) -> None:
        """Print one group."""
        if not panel.entries:
            return
        console.print(Text(panel.title, style="bold"))
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=LABEL_WIDTH, overflow="fold", style="cyan")
        table.add_column(overflow="fold")
        for entry in panel.entries:
            table.add_row(Text(_label(entry)), entry.description)
        console.print(Padding(table, (0, 0, 1, 2)))

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        """Print the first line."""
        console.print(Text(str(usage)))

    def render_description(self, console: Console, options: ConsoleOptions, text: Any) -> None:
        """Print what the command does."""
        console.print(text, end="")


def _label(entry: Any) -> str:
    if entry.positional_label:
        return str(entry.positional_label)
    name = entry.positive_names[0]
    if entry.negative_names:
        return f"--[no-]{name.removeprefix('--')}"
    return f"{name} {entry.metavar or ''}".rstrip()
