"""Options are fields of dataclasses: each is written once, with its help, its topic and its bounds.

Command lines, configuration files and checks are made from these fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# topics, in the order in which help shows them
ARGUMENTS = "Arguments"
REMOVED = "What to remove"
SEARCH = "How to search"
RECOVERY = "How to recover"
TEXT = "Text"
DEVICE = "Model and device"
OUTPUT = "Output"
TOPICS = (ARGUMENTS, REMOVED, SEARCH, RECOVERY, TEXT, DEVICE, OUTPUT)


def option(
    default: Any,
    help: str,
    *,
    group: str,
    minimum: int | None = None,
    positive: bool = False,
    read_with: Mapping[str, Iterable[Any]] | None = None,
    shown: str | None = None,
    value: str | None = None,
) -> Any:
    """A field that is an option.

    Args:
        default: its value unless given. In the options of a method: what preset "default" sets.
        help: one or two sentences.
        group: its topic.
        minimum: the smallest number that is allowed.
        positive: whether only finite numbers above 0 are allowed.
        read_with: values of other options of the same method; with none of them, this option has
            no effect. None: it always has one.
        shown: what None means, as help shows it.
        value: placeholder for its value in help, such as FILE. None: its type or its choices.
    """
    metadata = {
        "help": help,
        "group": group,
        "minimum": minimum,
        "positive": positive,
        "read_with": {name: tuple(values) for name, values in (read_with or {}).items()},
        "shown": shown,
        "value": value,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """The options that one method has for itself; defaults are those of preset "default".

    Raises:
        ValueError: a value is not allowed.
    """

    def __post_init__(self) -> None:
        check_values(self)

    def unread(self) -> dict[str, str]:
        """Options without effect at the values of the others, and why: "regression=groups"."""
        return unread_options(self)


def unread_options(options: Any) -> dict[str, str]:
    """Fields of options without effect at the values of the others, and why."""
    found = {}
    for item in fields(options):
        wanted = item.metadata.get("read_with") or {}
        now = {name: getattr(options, name) for name in wanted}
        if wanted and not any(now[name] in values for name, values in wanted.items()):
            found[item.name] = describe_values(now)
    return found


def refuse_unread(options: Any, usual: Any) -> None:
    """Raise ValueError if an option differs from its usual value and has no effect."""
    unread = unread_options(options)
    for item in fields(options):
        name = item.name
        if name in unread and getattr(options, name) != getattr(usual, name):
            wanted = describe_values(item.metadata["read_with"])
            raise ValueError(f"{name}: has no effect with {unread[name]}; it is read with {wanted}")


def describe_values(values: Mapping[str, Any], joint: str = ", ") -> str:
    """{"rounds": 3} -> "rounds=3"; of several values in a tuple: "regression=ridge or paper"."""
    texts = {
        name: " or ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
    }
    return joint.join(f"{name}={text}" for name, text in texts.items())


def check_values(options: Any) -> None:
    """Raise ValueError unless every field is one of its choices and within its bounds."""
    hints = get_type_hints(type(options))
    for item in fields(options):
        name, value = item.name, getattr(options, item.name)
        if value is None or not item.metadata:
            continue
        check_choice(name, hints[name], value)
        minimum = item.metadata["minimum"]
        if minimum is not None and value < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")
        if item.metadata["positive"] and not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def check_choice(name: str, hint: Any, value: Any) -> None:
    """Raise ValueError if the type is a Literal and the value is none of its choices."""
    choices = choices_of(hint)
    if choices and value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def choices_of(hint: Any) -> tuple[str, ...]:
    """The values of a Literal, optional or not; none if the type is another."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return tuple(choice for part in get_args(hint) for choice in choices_of(part))
    return ()


def plain_type(hint: Any) -> type:
    """The class of an option's values: bool, int, float or str."""
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) in (Union, UnionType):
        return next(plain_type(part) for part in get_args(hint) if part is not NoneType)
    assert isinstance(hint, type)
    return hint


def read_value(name: str, hint: Any, value: Any) -> Any:
    """A value that was typed or read from a file, in the type of its option.

    Raises:
        ValueError: it cannot be one.
    """
    kind = plain_type(hint)
    if kind is str:
        return str(value)
    text = str(value).strip()
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}: expected true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        number = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name}: expected {number}, got {text!r}") from error
