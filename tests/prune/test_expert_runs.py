"""Whole runs on mixtures of experts: methods that know experts, and refusals before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from searches import new_search
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import bonsai_fast as bf
from bonsai_fast.console import Reporter
from bonsai_fast.delivery import pruned_model
from bonsai_fast.export.padded import pad_to_stock
from bonsai_fast.methods import EXPERT_METHODS
from bonsai_fast.prune.units import prepare
from bonsai_fast.prune.weights import prepare_weights
from bonsai_fast.report import write_report
from bonsai_fast.runs.mask_files import load_mask
from bonsai_fast.surgery import remove_units

QUIET = Reporter(quiet=True)
SMALL = {"num_sequences": 2, "sequence_length": 32, "evaluation_tokens": 512, "recover": "none"}


def tiny_mixture() -> Qwen3MoeForCausalLM:
    """Every layer a mixture of 8 experts, which hold most of the parameters."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, moe_intermediate_size=32,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6 * torch.rand(len(parameter), *[1] * (parameter.dim() - 1)))
    return model


@pytest.fixture(autouse=True)
def not_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests load saved models in a fresh process."""
    monkeypatch.setattr(pruned_model, "verify_saved", lambda *_, **__: 0.0)


def prune(output: Path, **options: object) -> bf.PruneResult:
    config = bf.configure(**{**SMALL, **options})
    return bf.prune(tiny_mixture(), byte_tokenizer(), config, output_dir=output, reporter=QUIET)


@pytest.mark.parametrize("method", ["bonsai", "reap"])
def test_a_run_removes_experts_and_saves_a_stock_model(method: str, tmp_path: Path) -> None:
    result = prune(tmp_path / "run", method=method, sparsity=0.4, uniform=True)
    assert result.sparsity <= 0.4
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert type(model) is Qwen3MoeForCausalLM and model.num_parameters() == result.parameters
    assert model.config.num_experts < 8
    page = write_report(tmp_path / "run").read_text()
    kept = 3 * model.config.num_experts
    assert f"{kept}/24 experts" in page
    layout = bf.Layout.of(model)
    assert layout.num_by_kind["expert"] == 3 * model.config.num_experts


@pytest.mark.parametrize("method", sorted({"flap", "mini-llm"}))
def test_methods_without_a_value_for_experts_are_refused(method: str) -> None:
    assert method not in EXPERT_METHODS
    config = bf.configure(method=method, sparsity=0.2, **SMALL)
    with pytest.raises(ValueError, match=f"method {method}: it cannot say what an expert is worth"):
        prepare(tiny_mixture(), byte_tokenizer(), config)


@pytest.mark.parametrize("method", sorted({*EXPERT_METHODS} - {"bonsai", "reap"}))
def test_methods_that_value_experts(method: str, tmp_path: Path) -> None:
    """They choose by their own criterion, within the budget, and remove experts too."""
    few = {"rounds": 2, "submodels_per_round": 4} if method == "policy-gradient" else {}
    search = new_search(tiny_mixture(), tmp_path, method=method, sparsity=0.3, **few)
    keep = search.task.method.find(search)
    layout = search.task.layout
    assert 0 < layout.num_removed_parameters(keep) <= search.task.budget
    experts = torch.tensor([unit.kind == "expert" for unit in layout])
    assert not bool(keep[experts].all())


def test_channels_inside_experts(tmp_path: Path) -> None:
    """Widths that grouped products take; other multiples are refused before any work."""
    options = {"method": "wanda-sp", "experts": "channel", "sparsity": 0.4}
    result = prune(tmp_path / "run", **options, uniform=True)
    model = AutoModelForCausalLM.from_pretrained(result.output)
    assert type(model) is Qwen3MoeForCausalLM and model.num_parameters() == result.parameters
    assert model.config.num_experts == 8 and model.config.moe_intermediate_size in (8, 16, 24)
    assert load_mask(tmp_path / "run" / "masks" / "final.safetensors").experts == "channel"
    config = bf.configure(**SMALL, **options, round_to="4")
    with pytest.raises(ValueError, match=r"round_to: channels inside experts .* multiples of 8"):
        prepare(tiny_mixture(), byte_tokenizer(), config)


def test_prior_obs_is_refused() -> None:
    config = bf.configure(prior="obs", sparsity=0.2, **SMALL)
    with pytest.raises(ValueError, match="prior obs: it refits one projection"):
        prepare(tiny_mixture(), byte_tokenizer(), config)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_methods_that_zero_weights_would_leave_the_experts_out(method: str) -> None:
    config = bf.configure(method=method, sparsity=0.5, num_sequences=2, sequence_length=32)
    with pytest.raises(ValueError, match=f"method {method}: it zeroes weights of linear layers"):
        prepare_weights(tiny_mixture(), byte_tokenizer(), config)


def test_an_uneven_mixture_is_not_padded() -> None:
    model = tiny_mixture()
    layout = bf.Layout.of(model)
    keep = torch.ones(len(layout), dtype=torch.bool)
    keep[next(g.start for g in layout.groups if g.kind == "expert")] = False
    with pytest.raises(ValueError, match="the router would choose the padding"):
        pad_to_stock(remove_units(model, layout, keep))
