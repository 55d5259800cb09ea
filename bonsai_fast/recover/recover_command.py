"""What the command line of `bonsai-fast recover` can be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import get_args, get_type_hints

from bonsai_fast.checkpoints.load import LoadingOptions
from bonsai_fast.command_line import (
    FILES,
    Command,
    Entry,
    argument,
    entries_of,
    entry,
    value_of,
)
from bonsai_fast.config.choices import Tier
from bonsai_fast.config.options import DEVICE, OUTPUT, RECOVERY, option
from bonsai_fast.config.recover_config import RecoverConfig
from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.recover.pruned_source import TAKEN

# read by most methods; the page of a method lists the others that it reads
LISTED = ("recover_text", "recover_tokens", "recover_minutes")
MODEL = (argument("model", str, "Directory of a run or of a pruned model, or a hub name."),)
OTHERS = "The options of all methods are shown by bonsai-fast recover --help."


@dataclass(frozen=True, kw_only=True)
class CommandOptions(LoadingOptions):
    """What only the command line needs: how models are read and the result saved."""

    teacher: str | None = option(
        None,
        "Hub name or directory of the parent.",
        group=RECOVERY,
        shown="the one that the run or model names",
        value="PARENT",
    )
    method: Tier = option(
        "compensate",
        RecoverOptions.__dataclass_fields__["recover"].metadata["help"],
        group=RECOVERY,
        value="METHOD",
    )
    stream: bool = option(
        False,
        "Read the parent's layers from disk one at a time; with compensate and reconstruct the "
        "pruned model's too. Automatic if the parent does not fit.",
        group=DEVICE,
    )
    output: str | None = option(
        None,
        "New directory; the model is saved in DIR/model.",
        group=OUTPUT,
        shown="MODEL-METHOD",
        value="DIR",
    )
    plan: bool = option(False, "Print what would be done, and stop.", group=OUTPUT)


def command(summary: str, words: Sequence[str] = ()) -> Command:
    """The command; its help is about the method that the words name, if they name one."""
    method = value_of("--method", words)
    if method not in get_args(Tier):
        return Command("recover", summary, MODEL, _entries(None))
    text = RecoverOptions.__dataclass_fields__["recover"].metadata["help"]
    about = f"Recover a saved model by {method}.\n\n{text}\n\n{OTHERS}"
    hidden = tuple(replace(item, listed=False) for item in MODEL)
    return Command("recover", about, hidden, _entries(method))


def _entries(method: str | None) -> tuple[Entry, ...]:
    """All options; the help lists those of a method, or without one those of all methods."""
    hints = get_type_hints(RecoverConfig)
    found = list(entries_of(CommandOptions))
    for item in fields(RecoverConfig):
        name, only_with = item.name, item.metadata.get("read_with")
        if name == "recover":
            continue
        known = entry(name, hints[name], item)
        help_text = item.metadata["help"]
        if name in TAKEN and known.shown is not None and name != "evaluation":
            known = replace(known, shown=f"the run's, or {known.shown}")
        if method is None:
            is_listed = not only_with or name in LISTED
        else:
            is_listed = method in (only_with or {}).get("recover", ())
        # the page says which methods; the flag is --method here
        group = RECOVERY if name == "seed" else known.group
        found.append(replace(known, help=help_text, group=group, listed=is_listed))
    if method is not None:
        own = {item.name for item in fields(CommandOptions)}
        found = [replace(item, listed=item.listed and item.name not in own) for item in found]
    return (*found, *(replace(item, listed=method is None) for item in FILES))
