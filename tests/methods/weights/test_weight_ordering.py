"""The orderings of Wanda's tables 2 and 3: methods, patterns, and what competes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from transformers import LlamaForCausalLM
from weight_cases import pruned_run, random_text, task_of

from bonsai_fast.checkpoints.load import LoadingOptions, load_parent
from bonsai_fast.checkpoints.streaming import exchanged_weights
from bonsai_fast.console import Reporter
from bonsai_fast.evaluation.perplexity import perplexity_of
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.layerwise import sweep_losses
from bonsai_fast.methods import configure
from bonsai_fast.methods.weights.layer_by_layer import prune_layers
from bonsai_fast.prune.weights import prepare_weights
from bonsai_fast.runs.directory import open_weight_run

QUIET = Reporter(quiet=True)


def outlier_llama() -> LlamaForCausalLM:
    """Some features are a hundred times larger than others, as in trained models."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8}
    model = tiny_llama(num_hidden_layers=2, **sizes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator).exp())
            elif "mlp.up_proj" in name or "v_proj" in name:
                parameter.mul_(torch.randn(len(parameter), 1, generator=generator).exp())
    return model


@pytest.fixture(scope="module")
def damage(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Mean squared error of the logits on new text, by options."""
    model, text = outlier_llama(), random_text(258, 16, 64)
    fresh = torch.randint(258, (8, 64), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        dense = model(input_ids=fresh).logits
    known: dict[str, float] = {}

    def measure(**options: Any) -> float:
        if (key := str(options)) not in known:
            task = task_of(model, text, **options)
            run = pruned_run(task, tmp_path_factory.mktemp("run") / "run")
            with exchanged_weights(model, run.layers.find), torch.no_grad():
                known[key] = float((model(input_ids=fresh).logits - dense).square().mean())
        return known[key]

    return measure


@pytest.mark.parametrize("pattern", ["unstructured", "4:8", "2:4"])
def test_methods(pattern: str, damage: Any) -> None:
    magnitude, wanda, sparsegpt = (
        damage(method=method, pattern=pattern) for method in ("magnitude", "wanda", "sparsegpt")
    )
    assert sparsegpt < wanda < 0.8 * magnitude


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_patterns(method: str, damage: Any) -> None:
    free, loose, tight = (
        damage(method=method, pattern=pattern) for pattern in ("unstructured", "4:8", "2:4")
    )
    assert free < loose < tight


def test_groups_and_updates(damage: Any) -> None:
    """The weight update is what SparseGPT gains by; without it the metric alone is left."""
    assert damage(method="sparsegpt") < damage(method="sparsegpt", weight_update=False)
    assert damage(method="magnitude", weight_update=True) < damage(method="magnitude")


@pytest.mark.slow
def test_the_embedded_model(
    embedded_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity of a real model at 2:4: Wanda hurts it, magnitude destroys it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(embedded_cache))
    model, tokenizer = load_parent(None, LoadingOptions(device="cpu"))
    small = {"num_sequences": 4, "sequence_length": 256, "evaluation_tokens": 1024}

    def measured(method: str) -> float:
        config = configure(method=method, pattern="2:4", **small)
        task = prepare_weights(model, tokenizer, config)
        run = open_weight_run(tmp_path / method, task.config, model, None)
        prune_layers(task, run, QUIET)
        with exchanged_weights(model, run.layers.find):
            losses = sweep_losses(model, task.evaluation.input_ids, folder=tmp_path)
            return perplexity_of(losses, task.evaluation).value

    config = configure(method="wanda", **small)
    text: Sequences = prepare_weights(model, tokenizer, config).evaluation
    dense = perplexity_of(sweep_losses(model, text.input_ids, folder=tmp_path), text).value
    wanda, magnitude = measured("wanda"), measured("magnitude")
    assert 1.2 * dense < wanda < magnitude / 4
