"""save_pretrained: what is on disk loads in a fresh process and is the same function."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from families import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from surgery_cases import MASKS, TOLERANCE, difference, logits_of, pruned, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from bonsai_fast import hub
from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import SavedModelError, remove_units, save_pretrained, verify_saved

hub.register()

SAVED_MASKS = ("irregular", "first attention gone", "all attention gone")


class Saved(NamedTuple):
    directory: Path
    model: PreTrainedModel
    logits: torch.Tensor
    generated: torch.Tensor


def greedy(model: PreTrainedModel) -> torch.Tensor:
    prompt = tokens(length=6)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Every family with every mask, on disk."""
    root = tmp_path_factory.mktemp("saved")
    found = {}
    for family in FAMILIES:
        for mask in SAVED_MASKS:
            name = f"{family}-{mask}".replace(" ", "_")
            model = pruned(family, mask)
            save_pretrained(model, root / name)
            found[name] = Saved(root / name, model, logits_of(model, tokens()), greedy(model))
    return found


# Fresh processes --------------------------------------------------------------------------------

_REGISTERED = """
import bonsai_fast
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
assert {f"bonsai_{name}" for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} <= {*CONFIG_MAPPING}
# and none of their modelling files has been imported for that
files = [name for name in sys.modules if name.startswith("transformers.models.")]
files = [name for name in files if ".modeling_" in name and "modeling_auto" not in name]
assert not files, files
options = {}
"""

_TRUSTED = """
sys.modules["bonsai_fast"] = None  # not to be imported
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[4], trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("loaded without trust")
options = {"trust_remote_code": True}
"""

_LOAD_ALL = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

given, out, again = load_file(sys.argv[1]), {}, sys.argv[3]
for path in sys.argv[4:]:
    name = path.rpartition("/")[2]
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), (name, info)
    with torch.no_grad():
        out[f"{name}.logits"] = model.eval()(given["input_ids"]).logits
    prompt = given["prompt"]
    out[f"{name}.generated"] = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
    )
save_file(out, sys.argv[2])

# The last of them saves itself as any model does, and loads from there.
model.save_pretrained(again)
twin = AutoModelForCausalLM.from_pretrained(again, **options)
assert all((a == b).all() for a, b in zip(model.parameters(), twin.parameters(), strict=True))
base = AutoModel.from_pretrained(again, **options)
assert type(base).__name__ == type(model).__name__.replace("ForCausalLM", "Model"), type(base)
"""


def run_fresh(script: str, tmp_path: Path, *arguments: str) -> str:
    """Run a script in a new process with its own cache of dynamic modules."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(hub.__file__).parents[2]),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-P", "-c", "import sys\n" + script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("mode", [_REGISTERED, _TRUSTED], ids=["registered", "trust_remote_code"])
def test_a_fresh_process_computes_the_same(
    mode: str, saved: dict[str, Saved], tmp_path: Path
) -> None:
    """Also where bonsai_fast has never been; and what was loaded saves itself again."""
    inputs, outputs, again = (
        tmp_path / name for name in ("in.safetensors", "out.safetensors", "again")
    )
    save_file({"input_ids": tokens(), "prompt": tokens(length=6)}, inputs)
    directories = [str(known.directory) for known in saved.values()]
    run_fresh(mode + _LOAD_ALL, tmp_path, str(inputs), str(outputs), str(again), *directories)
    found = load_file(outputs)
    for name, expected in saved.items():
        assert difference(found[f"{name}.logits"], expected.logits) < TOLERANCE, name
        assert torch.equal(found[f"{name}.generated"], expected.generated), name
    files = {path.name for path in Path(directories[-1]).iterdir()}
    assert files - {path.name for path in again.iterdir()} == {"README.md", "bonsai_report.json"}


def test_the_travelling_files_need_nothing_else() -> None:
    """The travelling files import transformers, torch, huggingface_hub and each other."""
    allowed = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
    for name in ("configuration_bonsai.py", "modeling_bonsai.py", "configuration_decilm.py"):
        path = Path(hub.__file__).with_name(name)
        for line in path.read_text().splitlines():
            if line.startswith(("import ", "from ")):
                module = line.split()[1]
                assert module.startswith(".") or module.split(".")[0] in allowed, (path.name, line)


# What is written --------------------------------------------------------------------------------


def test_the_directory(saved: dict[str, Saved]) -> None:
    directory = saved["llama3-irregular"].directory
    assert {path.name for path in directory.iterdir()} == {
        "README.md",
        "bonsai_report.json",
        "config.json",
        "configuration_bonsai.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_bonsai.py",
    }
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "bonsai_llama"
    assert config["architectures"] == ["BonsaiLlamaForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_bonsai.BonsaiLlamaConfig",
        "AutoModel": "modeling_bonsai.BonsaiLlamaModel",
        "AutoModelForCausalLM": "modeling_bonsai.BonsaiLlamaForCausalLM",
    }
    # the parent's widths stay, each layer says its own
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (6, 2)
    assert (config["intermediate_size"], config["head_dim"]) == (40, 10)
    for index, shape in enumerate(saved["llama3-irregular"].model.config.layer_shapes()):
        entry = config["per_layer_config"][str(index)]
        assert entry["num_attention_heads"] == sum(shape.q_heads_per_kv)
        assert entry["intermediate_size"] == shape.channels
        assert "num_key_value_heads" not in entry  # as in the parent
        assert entry["q_heads_per_kv"] == list(shape.q_heads_per_kv) == [2, 3]


def test_removed_sublayers_on_disk(saved: dict[str, Saved]) -> None:
    """No tensors and no norm; the bias of an output projection alone stays."""
    for family, left in (("llama", set()), ("opt", {"self_attn.out_proj.bias"})):
        directory = saved[f"{family}-first_attention_gone"].directory
        config = json.loads((directory / "config.json").read_text())
        assert config["per_layer_config"]["0"]["skip"] == ["attention"]
        assert "layer_types" not in config
        with safe_open(directory / "model.safetensors", "pt") as file:
            names = {name.partition(".layers.0.")[2] for name in file.keys()} - {""}  # noqa: SIM118
        assert {name for name in names if "attn" in name or "input_layernorm" in name} == left


@pytest.mark.parametrize("family", ["llama3", "opt"])
def test_stock_results_are_saved_as_stock(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    layout = Layout.of(model)
    keep = torch.tensor([unit.kind != "channel" or unit.index < 24 for unit in layout])
    child = remove_units(model, layout, keep)
    save_pretrained(child, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == model.config.model_type
    assert not {"auto_map", "per_layer_config"} & config.keys()
    assert not list((tmp_path / "model").glob("*.py"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(again, tokens()), logits_of(child, tokens()))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_round_trip(family: str, saved: dict[str, Saved], tmp_path: Path) -> None:
    """from_pretrained -> save_pretrained -> from_pretrained; and surgery goes on from there."""
    known = saved[f"{family}-irregular"]
    first = AutoModelForCausalLM.from_pretrained(known.directory)
    first.save_pretrained(tmp_path)
    second = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(second, tokens()), known.logits)
    same = {"_name_or_path": first.config.name_or_path}
    assert second.config.to_dict() | same == first.config.to_dict()
    names = {path.name for path in tmp_path.iterdir()}
    ours = {path.name for path in known.directory.iterdir()} - names
    assert ours == {"README.md", "bonsai_report.json"}
    again, before = Layout.of(second), Layout.of(known.model)
    assert list(again) == list(before)
    keep = MASKS["most"](again)
    expected = logits_of(remove_units(known.model, before, keep), tokens())
    assert difference(logits_of(remove_units(second, again, keep), tokens()), expected) < TOLERANCE


def test_the_base_model_loads_too(saved: dict[str, Saved]) -> None:
    known = saved["gpt_neox-irregular"]
    base = AutoModel.from_pretrained(known.directory)
    assert type(base) is hub.hub_classes("gpt_neox").model
    expected = known.model.gpt_neox(tokens()).last_hidden_state
    assert torch.equal(base(tokens()).last_hidden_state, expected)


def test_models_from_a_configuration(saved: dict[str, Saved]) -> None:
    """Built on a real device, with transformers' own initialisation in every resized projection."""
    config = AutoConfig.from_pretrained(saved["qwen2-first_attention_gone"].directory)
    config.initializer_range = 1e-3
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "layers" in name:
            assert 0 < parameter.std() < 2e-3, name
    assert logits_of(model, tokens()).isfinite().all()


# The seven pitfalls of the format ---------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "phi3", "opt", "bloom", "gpt_neox"]
)
def test_pitfall_1_layer_0_without_attention(
    family: str, implementation: str, saved: dict[str, Saved]
) -> None:
    """A cache asks slot 0 for its length: an empty slot would put later tokens at position 0."""
    known = saved[f"{family}-first_attention_gone"]
    if family == "bloom":
        implementation = "eager"  # has no other
    model = AutoModelForCausalLM.from_pretrained(
        known.directory, attn_implementation=implementation
    )
    cache = DynamicCache(config=model.config)
    assert not isinstance(cache.layers[0], CacheLayerMixin)
    logits_of(model, tokens()[:, :-3], past_key_values=cache)
    assert cache.get_seq_length() == tokens().shape[1] - 3
    tail = logits_of(model, tokens()[:, -3:], past_key_values=cache)
    assert difference(tail, known.logits[:, -3:]) < TOLERANCE


def test_pitfall_2_the_stock_checks_do_not_apply(tmp_path: Path) -> None:
    """Saving validates: 5 heads do not divide a hidden size of 48. Our own checks apply instead."""
    config_class = hub.hub_classes("llama").config
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2}
    config = config_class(
        **sizes, per_layer_config={0: {"num_attention_heads": 5, "num_key_value_heads": 5}}
    )
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).layer_shapes() == config.layer_shapes()
    for entry, message in (
        ({"num_attention_heads": 5}, "do not fill 6 KV groups"),
        ({"num_attention_heads": 5, "q_heads_per_kv": [3, 1]}, "do not fill 6 KV groups"),
        ({"skip": ["norm"]}, "skip: expected"),
        ({"intermediate_size": 0}, "must be positive"),
    ):
        with pytest.raises(Exception, match=message):
            config_class(**sizes, per_layer_config={1: entry})


def test_pitfall_3_attributes_that_some_layers_have(saved: dict[str, Saved]) -> None:
    """transformers wants a global default of everything that a layer says."""
    config_class = hub.hub_classes("llama").config
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = config_class(
        **sizes,
        num_hidden_layers=2,
        per_layer_config={"1": {"num_attention_heads": 4, "q_heads_per_kv": [3, 1]}},
    )
    assert [shape.q_heads_per_kv for shape in config.layer_shapes()] == [(3, 3), (3, 1)]


@pytest.mark.parametrize(
    "family", sorted({build().config.model_type for build in FAMILIES.values()})
)
def test_pitfall_4_homogeneous_configurations(family: str) -> None:
    """transformers makes default ones while it saves and loads."""
    config = hub.hub_classes(family).config()
    assert len({(s.q_heads_per_kv, s.channels) for s in config.layer_shapes()}) == 1
    assert type(config)(**config.to_dict()).layer_shapes() == config.layer_shapes()


@pytest.mark.parametrize("family", FAMILIES)
def test_pitfall_5_loading_builds_on_the_meta_device(family: str, saved: dict[str, Saved]) -> None:
    """Nothing may stay there, and buffers that are not saved must be what they were."""
    for mask in ("irregular", "first_attention_gone"):
        known = saved[f"{family}-{mask}"]
        model = AutoModelForCausalLM.from_pretrained(known.directory)
        tensors = [*model.parameters(), *model.buffers()]
        assert all(tensor.device.type == "cpu" for tensor in tensors)
        buffers = dict(model.named_buffers())
        assert buffers.keys() == dict(known.model.named_buffers()).keys()
        for name, buffer in known.model.named_buffers():
            assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_pitfall_6_groups_of_different_sizes(implementation: str, saved: dict[str, Saved]) -> None:
    """Stock code repeats every KV head equally often."""
    for family in ("llama3", "mistral", "qwen2", "phi3", "phi_gqa"):
        known = saved[f"{family}-irregular"]
        assert any(shape.is_irregular for shape in known.model.config.layer_shapes()), family
        model = AutoModelForCausalLM.from_pretrained(known.directory)
        model.set_attn_implementation(implementation)
        assert difference(logits_of(model, tokens()), known.logits) < TOLERANCE
        assert torch.equal(greedy(model), known.generated)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma", "opt", "bloom"])
def test_pitfall_7_tied_embeddings(family: str, saved: dict[str, Saved]) -> None:
    """They are stored once, and are tied again after loading."""
    directory = saved[f"{family}-irregular"].directory
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# Verification in a fresh process ----------------------------------------------------------------


def test_verify_saved(saved: dict[str, Saved]) -> None:
    known = saved["phi3-irregular"]
    found = verify_saved(known.directory, tokens(), known.logits, tolerance=TOLERANCE)
    assert 0 <= found < TOLERANCE


def test_verify_saved_reports_missing_weights(saved: dict[str, Saved], tmp_path: Path) -> None:
    """transformers would fill them in at random."""
    known = saved["phi3-irregular"]
    broken = tmp_path / "broken"
    shutil.copytree(known.directory, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SavedModelError, match=r"does not load.*model\.norm\.weight") as caught:
        verify_saved(broken, tokens(), known.logits, tolerance=TOLERANCE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.full((1, 2, 3), 1.0), r"differ by 1, more than 0\.5"),
        (torch.full((1, 2, 3), torch.nan), "differ by nan"),
        (torch.zeros(1, 2, 4), r"shape \(1, 2, 4\), expected \(1, 2, 3\)"),
    ],
)
def test_verify_saved_reports_other_logits(
    logits: torch.Tensor, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bonsai_fast.surgery.verify.fresh_logits", lambda *_, **__: logits)
    with pytest.raises(SavedModelError, match=message):
        verify_saved("model", torch.zeros(1, 2), torch.zeros(1, 2, 3), tolerance=0.5)
