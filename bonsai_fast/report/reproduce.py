"""The command line that would repeat a recorded run."""

from __future__ import annotations

import shlex
from typing import Any

from bonsai_fast.checkpoints.embedded import NAME
from bonsai_fast.config import ResolvedConfig
from bonsai_fast.methods.configure import config_of_record, preset_values

# always shown, even if they are the default
SAID = ("target", "method", "preset", "seed")
DTYPES = ("float32", "bfloat16", "float16")


def command_line(manifest: dict[str, Any]) -> list[str]:
    """The command line of run.json: the command, then each flag with its value.

    What the preset sets is left to it; `prune.parse` reads the same configuration back.
    """
    config = recorded_config(manifest)
    usual = preset_values(config.method, config.preset)
    parent = manifest["parent"]
    words = [["bonsai-fast", "prune"]]
    if parent["name"] != NAME:
        words[0].append(str(parent["name"]) or "MODEL")
    for name, value in config.values_read().items():
        if value is None or (value == usual[name] and name not in SAID):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append([f"--{flag}" if value else f"--no-{flag}"])
        else:
            words.append([f"--{flag}", str(value)])
    if parent["dtype"] in DTYPES:
        words.append(["--dtype", parent["dtype"]])
    words.append(["--device", parent["device"]])
    return [shlex.join(chunk) for chunk in words]


def recorded_config(manifest: dict[str, Any]) -> ResolvedConfig[Any]:
    """The whole configuration of a run, with its preset filled in."""
    return config_of_record({**manifest["config"], **manifest["request"]})
