"""From names and values to a checked configuration, and from that to one with its preset filled in.

    configure(method="mini-llm", sparsity=0.3, directions=16)  ->  PruneConfig
    resolve(config)                                            ->  ResolvedConfig

An option that the chosen method does not read is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields, replace
from typing import Any, get_args, get_type_hints

from bonsai_fast.config import PruneConfig, ResolvedConfig
from bonsai_fast.config.choices import MethodName, PresetName, RecoverName
from bonsai_fast.config.options import MethodOptions, describe_values, read_value, refuse_unread
from bonsai_fast.config.presets import Preset
from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.config.run import CommonOptions
from bonsai_fast.config.weight_pattern import Pattern
from bonsai_fast.methods.registry import METHODS, WEIGHT_METHODS
from bonsai_fast.methods.weights.weight_options import WeightOptions
from bonsai_fast.recovery.tiers import steps_of

# what follows pruning, unless something else is asked for
RECOVER: RecoverName = "compensate"


@dataclass(frozen=True)
class Option:
    """An option as a command line or a file names it.

    Attributes:
        name: its name in Python; a flag has dashes for underscores.
        hint: its type, such as `int | None`.
        field: of its dataclass; see `config.options.option` for its metadata.
        methods: those that read it; empty if all do.
    """

    name: str
    hint: Any
    field: Field[Any]
    methods: tuple[MethodName, ...] = ()


def presets_of(method: str) -> Mapping[PresetName, Preset[Any]]:
    """The presets of a method of either kind."""
    return (METHODS.get(method) or WEIGHT_METHODS[method]).presets


def options_class(method: str) -> type[MethodOptions]:
    """The class of a method's own options."""
    return type(presets_of(method)["default"].options)


def common_options() -> dict[str, Option]:
    """The options of all methods, by name."""
    return _options_of(PruneConfig, without=("options",))


def method_options(method: str) -> dict[str, Option]:
    """The options that a method has for itself, by name."""
    return _options_of(options_class(method))


def all_options() -> dict[str, Option]:
    """Every option by name; where methods share a name, field and type are those of the first."""
    found = common_options()
    for method in get_args(MethodName):
        for name, option in method_options(method).items():
            known = found.setdefault(name, option)
            found[name] = replace(known, methods=(*known.methods, method))
    return found


def preset_values(method: MethodName, preset: PresetName = "default") -> dict[str, Any]:
    """The values of all options that a method takes if nothing else is asked for."""
    return resolve(PruneConfig(method=method, preset=preset)).values()


def configure(**values: Any) -> PruneConfig:
    """A configuration from the names and values of any options.

    Args:
        values: by name, those of the method beside the others. They may be text, as they are typed;
            None leaves an option to the preset.
    Raises:
        ValueError: an option is unknown, the method does not read it, or a value is not allowed.
    """
    given = {name: value for name, value in values.items() if value is not None}
    common = common_options()
    config = PruneConfig(**_read(given, common))
    rest = {name: value for name, value in given.items() if name not in common}
    known = method_options(config.method)
    for name in rest:
        if name not in all_options():
            raise ValueError(_unknown(name))
        if name not in known:
            raise ValueError(_not_read(name, config.method))
    if rest:
        usual = presets_of(config.method)[config.preset].options
        config = replace(config, options=replace(usual, **_read(rest, known)))
        _refuse_unread(config, rest)
    resolve(config)
    return config


def resolve(config: PruneConfig) -> ResolvedConfig[Any]:
    """The same with every value that was left to the preset filled in.

    Raises:
        ValueError: the options are another method's, or one is set that the method does not read.
    """
    preset = presets_of(config.method)[config.preset]
    usual = preset.options
    options = config.options or usual
    if type(options) is not type(usual):
        raise ValueError(
            f"options: method {config.method} takes {type(usual).__name__}, "
            f"got {type(options).__name__}"
        )
    changed = [i.name for i in fields(usual) if getattr(options, i.name) != getattr(usual, i.name)]
    _refuse_unread(config, changed)
    resolved: ResolvedConfig[Any] = ResolvedConfig(
        **{item.name: getattr(config, item.name) for item in fields(CommonOptions)},
        **asdict(_recovery(config)),
        num_sequences=config.num_sequences or preset.num_sequences,
        sequence_length=config.sequence_length or preset.sequence_length,
        options=options,
    )
    return _with_pattern(resolved) if isinstance(options, WeightOptions) else resolved


def config_of_record(values: Mapping[str, Any]) -> ResolvedConfig[Any]:
    """The configuration of a run from what its run.json holds.

    Names that the method does not read, and values that are None, do not matter: earlier versions
    recorded all options of all methods.
    """
    found = {name: value for name, value in values.items() if value is not None}
    # earlier versions did not recover
    config = PruneConfig(**_read({"recover": "none", **found}, common_options()))
    usual = presets_of(config.method)[config.preset].options
    options = replace(usual, **_read(found, method_options(config.method)))
    unread = {name: getattr(usual, name) for name in options.unread()}
    return resolve(replace(config, options=replace(options, **unread)))


def _recovery(config: PruneConfig) -> RecoverOptions:
    """The options of recovery with its name filled in.

    Raises:
        ValueError: an option is set that has no effect, or zeroed weights would not stay zero.
    """
    zeros = config.method in WEIGHT_METHODS
    name = config.recover or ("none" if zeros or config.preset == "paper" else RECOVER)
    found = replace(config.recovery, recover=name)
    steps_of(name, zeros=zeros)
    refuse_unread(found, RecoverOptions(recover=name))
    return found


def _options_of(owner: type[Any], without: tuple[str, ...] = ()) -> dict[str, Option]:
    hints = get_type_hints(owner)
    return {
        item.name: Option(item.name, hints[item.name], item)
        for item in fields(owner)
        if item.name not in without
    }


def _read(values: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """Those of the values that are known, each in its option's type."""
    return {
        name: read_value(name, known[name].hint, value)
        for name, value in values.items()
        if name in known
    }


def _with_pattern(config: ResolvedConfig[WeightOptions]) -> ResolvedConfig[WeightOptions]:
    """Sparsity and pattern of a method that zeroes weights, each from the other."""
    if config.target is not None:
        raise ValueError(
            f"target: method {config.method} zeroes weights and keeps their number; "
            f"give a sparsity or a pattern"
        )
    pattern = Pattern.parse(config.options.pattern, config.sparsity)
    text = str(pattern).partition(" ")[0]
    return replace(
        config, sparsity=float(pattern.sparsity), options=replace(config.options, pattern=text)
    )


def _refuse_unread(config: PruneConfig, names: Mapping[str, Any] | list[str]) -> None:
    """Raise ValueError if one of these options has no effect at the values of the others."""
    unread = config.options.unread() if config.options else {}
    for name in names:
        if name in unread:
            raise ValueError(_not_read(name, config.method, unread[name]))


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, all_options(), n=1)
    return f"{name}: no such option" + (f"; did you mean {near[0]}?" if near else "")


def _not_read(name: str, method: MethodName, because: str = "") -> str:
    """Why an option is refused, and what reads it."""
    where = []
    if because:
        wanted = method_options(method)[name].field.metadata["read_with"]
        found = [
            preset
            for preset, values in presets_of(method).items()
            if name not in values.options.unread()
        ]
        as_in = f" (as in preset {' or '.join(found)})" if found else ""
        where.append(f"with {describe_values(wanted, ' or ')}{as_in}")
    others = [other for other in all_options()[name].methods if other != method]
    if others:
        where.append(f"by {', '.join(others)}")
    return (
        f"{name}: method {method}{because and f' with {because}'} does not read it; "
        f"it is read {' and '.join(where)}"
    )
