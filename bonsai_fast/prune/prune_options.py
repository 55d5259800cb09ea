"""What the command line of `bonsai-fast prune` can be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import get_args

from bonsai_fast.checkpoints.embedded import NAME
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
from bonsai_fast.config.choices import MethodName, PresetName, RecoverName
from bonsai_fast.config.options import DEVICE, OUTPUT, option
from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.methods.configure import all_options, common_options, method_options, preset_values
from bonsai_fast.methods.registry import SUMMARIES

# options of all methods, of which each method's presets set the values
SET_BY_PRESET = ("num_sequences", "sequence_length")
MODEL = (argument("model", str | None, "Hub name or directory of the model.", NAME),)
OTHERS = "The options of all methods are shown by bonsai-fast prune --help."
# the help of another command explains these
ELSEWHERE = tuple(item.name for item in fields(RecoverOptions) if item.name != "recover")
RECOVER = (
    f"Done after pruning: {', '.join(get_args(RecoverName)[:-1])} or "
    f"{get_args(RecoverName)[-1]}; see bonsai-fast recover --help."
)


@dataclass(frozen=True, kw_only=True)
class CommandOptions(LoadingOptions):
    """What only the command line needs: how the model is read and the result saved."""

    stream: bool = option(
        False,
        "Read the layers from disk one at a time. Automatic if weights and --memory-budget exceed "
        "the memory of the device.",
        group=DEVICE,
    )
    output: str | None = option(
        None,
        "Directory of the run; the pruned model is saved in DIR/model.",
        group=OUTPUT,
        shown="runs/MODEL-TARGET",
        value="DIR",
    )
    plan: bool = option(
        False, "Print what would be done and how long it takes, and stop.", group=OUTPUT
    )


def command(summary: str, words: Sequence[str] = ()) -> Command:
    """The command; its help is about the method that the words name, if they name one.

    Args:
        summary: of the command as a whole.
        words: of the command line.
    """
    asked = value_of("--method", words)
    method = next((name for name in SUMMARIES if name == asked), None)
    if method is not None:
        summary = f"Method {method} {SUMMARIES[method]}\n\n{OTHERS}"
        hidden = tuple(replace(item, listed=False) for item in MODEL)
        return Command("prune", summary, hidden, options(method))
    return Command("prune", summary, MODEL, options())


def options(method: MethodName | None = None) -> tuple[Entry, ...]:
    """All options; the help lists those of a method, or without one those of all methods."""
    found = []
    own = (*method_options(method), *SET_BY_PRESET) if method else ()
    for name, known in ({name: all_options()[name] for name in own} | all_options()).items():
        first: MethodName = known.methods[0] if known.methods else "bonsai"
        owner = method if method and name in own else first
        listed = name in own if method else not (known.methods or name in ELSEWHERE)
        found.append(preset_entry(name, owner, listed=listed))
    rest = (*entries_of(CommandOptions), *FILES)
    return (*found, *(replace(item, listed=method is None) for item in rest))


def preset_entry(
    name: str,
    method: MethodName,
    presets: tuple[PresetName, ...] = get_args(PresetName),
    *,
    listed: bool = True,
) -> Entry:
    """An option of `configure` with the defaults that the presets of a method set."""
    known = (all_options() | method_options(method))[name]
    is_common = name in common_options() and name not in SET_BY_PRESET
    # a switch that is on for one method can be switched off
    is_switch = known.hint is bool
    found = entry(
        name,
        known.hint | None if is_switch else known.hint,
        known.field,
        *() if is_common else (preset_values(method, preset)[name] for preset in presets),
        listed=listed,
    )
    return replace(found, help=RECOVER) if name == "recover" else found
