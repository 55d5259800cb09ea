"""YAML files that --config reads and --save-config writes."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from cyclopts import App, CycloptsError
from cyclopts.config import Dict

from bonsai_fast.files import write_atomically


def read_config(app: App, commands: tuple[str, ...], arguments: Any) -> None:
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


def save_config(path: str | None, **values: Any) -> None:
    """Write options to a YAML file that --config reads; nothing if no path is given.

    Raises:
        OSError: it cannot be written.
    """
    if path is not None:
        known = {name: value for name, value in values.items() if value is not None}
        text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
        write_atomically(Path(path), text.encode())
