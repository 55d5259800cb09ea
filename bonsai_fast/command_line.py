"""Command lines made from dataclasses: an option for each field, YAML files, one-line errors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_type_hints

import yaml
from cyclopts import (
    App,
    CycloptsError,
    Group,
    MissingArgumentError,
    Parameter,
    UnusedCliTokensError,
)
from cyclopts.config import Dict

from bonsai_fast.config.options import ARGUMENTS, OUTPUT, TOPICS, choices_of
from bonsai_fast.console import fail
from bonsai_fast.files import write_atomically
from bonsai_fast.help_page import LABEL_WIDTH, HelpPage

T = TypeVar("T")
# what stands for a value in the help
PLACEHOLDERS = {int: "N", float: "X", str: "TEXT", bool: ""}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One option, or one positional argument, of a command.

    Attributes:
        name: with underscores, as in Python and YAML.
        hint: its type.
        help: what it does.
        group: topic in the help.
        shown: its default, as the help shows it.
        value: what stands for its value in the help; None: its choices or its type.
        listed: whether the help lists it; it is parsed in any case.
        positional: whether it is given without its name.
        required: whether it must be given.
    """

    name: str
    hint: Any
    help: str
    group: str
    shown: str | None = None
    value: str | None = None
    listed: bool = True
    positional: bool = False
    required: bool = False

    @property
    def flag(self) -> str:
        """As it is typed."""
        return "--" + self.name.replace("_", "-")

    def parameter(self, group: Group) -> inspect.Parameter:
        """The same, as a parameter of a function that cyclopts reads."""
        kinds = tuple(kind for kind in get_args(self.hint) if kind is not type(None))
        choices = choices_of(self.hint)
        value, text = "|".join(choices), self.help
        if len(f"{self.flag} {value}") > LABEL_WIDTH:
            value = "NAME"
            if not self.value and not all(choice in text for choice in choices):
                text = f"{text} One of {', '.join(choices)}."
        kind = (kinds or (self.hint,))[0]
        value = self.value or value or PLACEHOLDERS.get(kind, "TEXT ...")
        settings = Parameter(
            help=text + (f" [default: {self.shown}]" if self.shown else ""),
            group=group,
            show=self.listed,
            show_default=False,
            show_choices=False,
            metavar=value,
            # --no-NAME only where neither yes nor no is the default
            negative=None if bool in kinds else (),
            consume_multiple=True,
            # the last one wins
            allow_repeating=True,
        )
        return inspect.Parameter(
            self.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD
            if self.positional
            else inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if self.required else None,
            annotation=Annotated[self.hint, settings],
        )


def argument(name: str, hint: Any, help_text: str, shown: str | None = None) -> Entry:
    """A positional argument; required unless `shown` says its default."""
    return Entry(
        name=name,
        hint=hint,
        help=help_text,
        group=ARGUMENTS,
        shown=shown,
        positional=True,
        required=shown is None,
    )


def entry(name: str, hint: Any, field: Field[Any], *defaults: Any, listed: bool = True) -> Entry:
    """The option that a field of a dataclass stands for.

    Args:
        name, hint, field: of the field; `config.options.option` made it.
        defaults: those of the presets "default" and "paper"; the field's own if left out.
        listed: whether the help lists it.
    """
    metadata = field.metadata
    texts = [_words(value, metadata["shown"]) for value in defaults or (field.default,)]
    shown = texts[0] if texts[-1] == texts[0] else f"{texts[0]}; paper: {texts[-1]}"
    if hint is bool:
        shown = None  # --NAME says it
    return Entry(
        name=name,
        hint=hint,
        help=metadata["help"] + _only_with(metadata["read_with"]),
        group=metadata["group"],
        shown=shown,
        value=metadata["value"],
        listed=listed,
    )


def entries_of(kind: Any) -> tuple[Entry, ...]:
    """The options that the fields of a dataclass stand for."""
    hints = get_type_hints(kind)
    return tuple(entry(item.name, hints[item.name], item) for item in fields(kind))


def _words(value: Any, none: str | None) -> str | None:
    """A default as the help shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return none if value is None else str(value)


def _only_with(read_with: Mapping[str, Iterable[Any]]) -> str:
    if not read_with:
        return ""
    texts = [
        f"--{name.replace('_', '-')} {' or '.join(map(str, values))}"
        for name, values in read_with.items()
    ]
    return f" Only with {' or with '.join(texts)}."


FILES = (
    Entry(
        name="config",
        hint=str | None,
        help="Read options from a YAML file; the command line wins.",
        group=OUTPUT,
        value="FILE",
    ),
    Entry(
        name="save_config",
        hint=str | None,
        help="Write all options that are used to a YAML file, for --config.",
        group=OUTPUT,
        value="FILE",
    ),
)


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
            config=_read_config,
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
        if isinstance(error, MissingArgumentError) and error.argument:
            for item in self.arguments:
                if item.flag == error.argument.name:
                    return ValueError(f"{item.name.upper()} is missing: {self.usage}")
        return error


def _read_config(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Give the values of the file of --config to the arguments that have none yet."""
    tokens = next(item for item in arguments if item.name == "--config").tokens
    if tokens:
        path = tokens[-1].value
        values = _read_yaml(path)
        flags = {item.name for item in arguments}
        for name in values:
            flag = "--" + name.replace("_", "-")
            if flag not in flags:
                near = get_close_matches(flag, flags, n=1)
                raise CycloptsError(
                    msg=f"{path}: unknown option {name}."
                    + "".join(f" Did you mean {word.removeprefix('--')}?" for word in near)
                )
        Dict(values, source=path, use_commands_as_keys=False)(app, commands, arguments)


def _read_yaml(path: str) -> dict[str, Any]:
    """Names and values of a YAML file; scalars stay text, to be read as on a command line."""
    try:
        # the safe loader would read 2:4 as a number to the base of 60
        values = yaml.load(Path(path).read_text(), yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise CycloptsError(msg=f"{path} is not readable as YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise CycloptsError(msg=f"{path}: expected lines of the form name: value")
    return {name: value for name, value in values.items() if value not in ("", "null", "~")}


def taken(kind: type[T], values: dict[str, Any]) -> T:
    """A dataclass from those of the values that are its fields, which are removed from them."""
    names = [item.name for item in fields(cast(Any, kind)) if item.name in values]
    return kind(**{name: values.pop(name) for name in names})


def save_config(path: str | None, **values: Any) -> None:
    """Write options to a YAML file that --config reads; nothing if no path is given.

    Raises:
        OSError: it cannot be written.
    """
    if path is not None:
        known = {name: value for name, value in values.items() if value is not None}
        text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
        write_atomically(Path(path), text.encode())
