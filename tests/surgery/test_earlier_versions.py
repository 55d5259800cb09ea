"""Directories that earlier versions saved, with two Python files for each family, still load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from surgery_cases import difference, logits_of, pruned, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from bonsai_fast.surgery import save_pretrained

# config.json as it was written then; names and shapes of the weights have not changed
CONFIGS = json.loads(Path(__file__).with_name("earlier_configs.json").read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_loads_and_is_saved_as_today(name: str, tmp_path: Path) -> None:
    family, _, mask = name.partition("-")
    model = pruned(family, mask.replace("_", " "))
    save_pretrained(model, tmp_path / "old")
    config = tmp_path / "old" / "config.json"
    assert {*CONFIGS[name]} - {*json.loads(config.read_text())} <= {"layer_types"}
    config.write_text(json.dumps(CONFIGS[name]))

    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "old", output_loading_info=True, trust_remote_code=True
    )
    assert not any(report.values())
    expected = logits_of(model, tokens())
    assert torch.equal(logits_of(loaded, tokens()), expected)
    cache = loaded(tokens()[:, :-3]).past_key_values
    rest = logits_of(loaded, tokens()[:, -3:], past_key_values=cache)
    assert difference(rest, expected[:, -3:]) < 1e-4

    loaded.save_pretrained(tmp_path / "new")
    again = json.loads((tmp_path / "new" / "config.json").read_text())
    assert again["auto_map"] == model.config.auto_map
    assert again["cut_table"]["layers"] == model.config.cut_table["layers"]
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert torch.equal(logits_of(twin, tokens()), expected)


def test_the_table_of_an_earlier_directory_is_the_one_of_today(tmp_path: Path) -> None:
    """Apart from biases that a family may have, and numbers that some modules do not keep."""
    for name, values in CONFIGS.items():
        (tmp_path / "config.json").write_text(json.dumps(values))
        (found,) = AutoConfig.from_pretrained(tmp_path).cut_table["kinds"]
        (today,) = pruned(name.partition("-")[0], "irregular").config.cut_table["kinds"]
        for sublayer, entry in today.items():
            earlier = found[sublayer]
            assert earlier["sizes"].items() >= entry["sizes"].items(), name
            same = entry.keys() - {"sizes", "counts"}
            assert {key: earlier.get(key) for key in same} == {key: entry[key] for key in same}
