"""A command: parsed by cyclopts, with help, --config and one-line errors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    Group,
    MissingArgumentError,
    UnusedCliTokensError,
)

from bonsai_fast.command_line.config_file import read_config
from bonsai_fast.command_line.entry import Entry
from bonsai_fast.command_line.help_page import HelpPage
from bonsai_fast.config.options import ARGUMENTS, TOPICS, check_choice, read_value
from bonsai_fast.console import fail

T = TypeVar("T")


@dataclass(frozen=True)
class Command:
    """A command: what it does and what it can be given.

    Attributes:
        name: behind `bonsai-fast`.
        summary: what it does; its first paragraph is one line.
        arguments: positional ones.
        options: all others.
    """

    name: str
    summary: str
    arguments: tuple[Entry, ...]
    options: tuple[Entry, ...]

    @property
    def usage(self) -> str:
        """How it is typed."""
        words = [
            (item.name.upper() if item.required else f"[{item.name.upper()}]")
            + (" ..." if item.hint == list[str] else "")
            for item in self.arguments
        ]
        return " ".join(["bonsai-fast", self.name, *words, "[OPTION ...]"])

    def app(self, *, list_all: bool = False) -> App:
        """The parser of cyclopts; `list_all` makes it list every option, for shell completion."""

        def given(*values: Any, **named: Any) -> None: ...

        options = [
            replace(item, listed=item.listed or list_all)
            for item in (*self.arguments, *self.options)
        ]
        # a command's own topics come after its arguments
        names = sorted(
            dict.fromkeys(item.group for item in options),
            key=lambda name: TOPICS.index(name) if name in TOPICS else 0.5,
        )
        groups = {name: Group(name, sort_key=place) for place, name in enumerate(names)}
        parameters = [item.parameter(groups[item.group]) for item in options]
        given.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        app = App(
            name=self.name,
            help=self.summary.strip(),
            help_format="plaintext",
            help_formatter=HelpPage(),
            usage=f"Usage: {self.usage}",
            version_flags=(),
            group_arguments=groups.get(ARGUMENTS),
            group_commands=Group("Help", show=False),
            config=read_config,
        )
        app.default(given)
        return app

    def parse(self, words: Sequence[str] | None) -> tuple[dict[str, Any], str | None]:
        """What a command line and its file give; ends the process after help or an error.

        Args:
            words: of the command line, without its name; those of the process if None.
        Returns:
            Values by name, without those that were left out; where to save the configuration.
        """
        words = list(sys.argv[1:] if words is None else words)
        app = self.app()
        try:
            command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        except (CycloptsError, OSError) as error:
            raise SystemExit(fail(self._clearer(error))) from None
        if command is not app.default_command:
            command(*bound.args, **bound.kwargs)
            raise SystemExit(0)
        values = dict(bound.arguments)
        values.pop("config", None)
        return values, values.pop("save_config", None)

    def _clearer(self, error: Exception) -> Exception:
        """The same error, in the words of this command where those of cyclopts are not."""
        if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
            return ValueError(f"unexpected argument {error.unused_tokens[0]}")
        known = {item.flag: item for item in (*self.arguments, *self.options)}
        argument = getattr(error, "argument", None)
        item = known.get(argument.name) if argument else None
        if isinstance(error, MissingArgumentError) and item and item.positional:
            return ValueError(f"{item.name.upper()} is missing: {self.usage}")
        if isinstance(error, CoercionError) and item and error.token:
            token = error.token
            try:
                check_choice(item.name, item.hint, token.value)
                read_value(item.name, item.hint, token.value)
            except ValueError as clearer:
                return ValueError(
                    f"{'' if token.source == 'cli' else f'{token.source}: '}{clearer}"
                )
        return error


def taken(kind: type[T], values: dict[str, Any]) -> T:
    """A dataclass from those of the values that are its fields, which are removed from them."""
    names = [item.name for item in fields(cast(Any, kind)) if item.name in values]
    return kind(**{name: values.pop(name) for name in names})


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """The last value that a command line gives to an option."""
    found = None
    for word, following in zip(words, [*words, None][1:], strict=True):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found
