"""One option or argument of a command, made from a field of a dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Annotated, Any, get_args, get_type_hints

from cyclopts import Group, Parameter, Token

from bonsai_fast.command_line.help_page import LABEL_WIDTH
from bonsai_fast.config.options import ARGUMENTS, OUTPUT, choices_of

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
            converter=_whole if kind is int else None,
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


def _whole(kind: type, tokens: Sequence[Token]) -> int:
    """A whole number; cyclopts would round others."""
    return int(tokens[0].value)


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
