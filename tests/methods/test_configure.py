"""Options by name: presets fill in what is left out; what nothing would read is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

import pytest

import bonsai_fast as bf
from bonsai_fast.config.choices import MethodName, PresetName, UnitMethodName, WeightMethodName
from bonsai_fast.config.options import TOPICS
from bonsai_fast.methods import METHODS, WEIGHT_METHODS, configure, resolve
from bonsai_fast.methods.configure import (
    all_options,
    config_of_record,
    method_options,
    preset_values,
)
from bonsai_fast.methods.units.bonsai_options import BonsaiOptions
from bonsai_fast.methods.units.unit_options import SparingOptions
from bonsai_fast.prune.prune_options import ELSEWHERE


def test_every_method_has_a_name_and_every_name_a_method() -> None:
    assert METHODS.keys() == set(get_args(UnitMethodName))
    assert WEIGHT_METHODS.keys() == set(get_args(WeightMethodName))


@pytest.mark.parametrize("preset", get_args(PresetName))
@pytest.mark.parametrize("method", get_args(MethodName))
def test_presets_decide_about_everything_that_is_left_out(
    method: MethodName, preset: PresetName
) -> None:
    values = preset_values(method, preset)
    assert values["num_sequences"] >= 32
    left = {name for name, value in values.items() if value is None}
    common = {"sparsity", "target", "evaluation", "tasks", "memory_budget", "sequence_length"}
    assert left <= common | {"rounds", "perturbation_scale", *ELSEWHERE}
    assert values["recover"] in ("none", "compensate")
    # asking for exactly what a preset takes changes nothing
    config = resolve(configure(method=method, preset=preset, num_sequences=3))
    again = {name: value for name, value in config.values_read().items() if value is not None}
    assert resolve(configure(**again)) == config
    assert config_of_record(config.values_read()) == config


def test_names_and_text_give_the_same_as_objects() -> None:
    assert configure() == configure(rounds=None) == bf.PruneConfig()
    asked = configure(sparsity="0.3", regression="ridge", rounds="2", sublayers="true")
    options = BonsaiOptions(regression="ridge", rounds=2, sublayers=True)
    assert asked == bf.PruneConfig(sparsity=0.3, options=options)
    assert resolve(asked).options.submodels_per_round == 200
    assert resolve(configure(round_to=64)).options.width_multiple == 64


UNREAD = {
    "by the method": (
        {"method": "flap", "rounds": 3},
        "rounds: method flap does not read it; it is read by bonsai, policy-gradient",
    ),
    "by the preset": (
        {"submodels_per_round": 8},
        "submodels_per_round: method bonsai with regression=groups does not read it; it is read "
        "with regression=ridge or paper (as in preset paper) and by policy-gradient",
    ),
    "though it is the preset's value": (
        {"method": "mini-llm", "granularity": "blocks"},
        "with perturbation=weights does not read it; it is read with perturbation=gates",
    ),
    "by any": (
        {
            "method": "policy-gradient",
            "initial": "random",
            "granularity": "units",
            "prior": "wanda",
        },
        "with initial=random, granularity=units does not read it; it is read with "
        "initial=wanda-sp or granularity=blocks or shares",
    ),
    "by the other kind": (
        {"method": "wanda", "round_to": "32"},
        "round_to: method wanda does not read it",
    ),
    "under the pattern": (
        {"method": "wanda", "pattern": "2:4", "compare_within": "layer"},
        "compare_within: method wanda with pattern=2:4 does not read it",
    ),
    "target": ({"method": "sparsegpt", "target": "params=1B"}, "give a sparsity or a pattern"),
    "unknown": ({"submodels": 3}, "no such option; did you mean submodels_per_round?"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_refused_by_name(name: str) -> None:
    options, message = UNREAD[name]
    with pytest.raises(ValueError) as caught:
        configure(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_options_of_another_method_are_refused() -> None:
    config = bf.PruneConfig(method="flap", options=BonsaiOptions())
    with pytest.raises(ValueError, match="method flap takes SparingOptions, got BonsaiOptions"):
        resolve(config)
    with pytest.raises(ValueError, match="submodels_per_round: method bonsai with regression=g"):
        resolve(bf.PruneConfig(options=BonsaiOptions(submodels_per_round=8)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rounds": "few"}, "rounds: expected a whole number, got 'few'"),
        ({"rounds": 2.5}, "rounds: expected a whole number, got '2.5'"),
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"sublayers": "maybe"}, "sublayers: expected true or false, got 'maybe'"),
        ({"head_layout": "round"}, "head_layout: expected one of rectangular, free, got 'round'"),
        ({"method": "policy-gradient", "learning_rate": "nan"}, "expected a positive number"),
        ({"method": "random", "spare_first": -1}, "spare_first: expected at least 0, got -1"),
        ({"method": "magic"}, "method: expected one of bonsai, "),
        ({"sparsity": "half"}, "sparsity: expected a number, got 'half'"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(**options)


def test_every_option_has_help_a_topic_and_one_meaning_for_its_name() -> None:
    for name, option in all_options().items():
        assert option.field.metadata["help"].endswith("."), name
        assert option.field.metadata["group"] in TOPICS, name
    for method in METHODS:
        assert {item.name for item in fields(SparingOptions)} - method_options(method).keys() <= {
            "spare_first",
            "spare_last",
        }
    assert all_options()["regression"].methods == ("bonsai",)


def test_records_of_all_options_of_all_methods_are_read() -> None:
    """Earlier versions recorded every option, whether the method read it or not."""
    record: dict[str, Any] = dict.fromkeys(all_options())
    record |= {"method": "flap", "preset": "paper", "prior": "wanda", "regression": "paper"}
    record |= {"attention": "head", "head_layout": "free", "round_to": "1", "num_sequences": 32}
    record |= {"submodels_per_round": 200, "evaluation_tokens": 8192, "calibration": "builtin"}
    assert config_of_record(record | {"seed": 0}) == resolve(
        configure(method="flap", preset="paper")
    )
