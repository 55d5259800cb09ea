"""The command line that would repeat a recorded run."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any

from bonsai_fast.checkpoints.embedded import NAME
from bonsai_fast.config import PruneConfig

# always shown, even if they are the default
SAID = ("target", "method", "preset", "seed")
DTYPES = ("float32", "bfloat16", "float16")


def command_line(manifest: dict[str, Any]) -> list[str]:
    """The command line of run.json: the command, then each flag with its value.

    What the preset sets is left to it; `prune.parse` reads the same configuration back.
    """
    config = recorded_config(manifest)
    usual = PruneConfig(method=config.method, preset=config.preset).resolved()
    parent = manifest["parent"]
    words = [["python", "-m", "bonsai_fast.prune"]]
    if parent["name"] != NAME:
        words[0].append(str(parent["name"]) or "MODEL")
    for item in fields(PruneConfig):
        value = getattr(config, item.name)
        if value is None or (value == getattr(usual, item.name) and item.name not in SAID):
            continue
        flag = "--" + item.name.replace("_", "-")
        words.append([flag] if value is True else [flag, str(value)])
    if parent["dtype"] in DTYPES:
        words.append(["--dtype", parent["dtype"]])
    words.append(["--device", parent["device"]])
    return [shlex.join(chunk) for chunk in words]


def recorded_config(manifest: dict[str, Any]) -> PruneConfig:
    """The resolved configuration of a run."""
    known = {item.name for item in fields(PruneConfig)}
    values = {**manifest["config"], **manifest["request"]}
    return PruneConfig(**{name: value for name, value in values.items() if name in known})
