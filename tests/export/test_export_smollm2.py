"""A real model, pruned by a fifth, in llama.cpp: SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_cases import save_masked
from transformers import AutoModelForCausalLM, AutoTokenizer

from bonsai_fast.checkpoints.embedded import embedded_model
from bonsai_fast.export import TOLERANCE, check_llama_cpp, reference_of, to_gguf
from bonsai_fast.models.layout import Layout

pytest.importorskip("xllamacpp")


def mild_mask(layout: Layout, sparsity: float) -> torch.Tensor:
    """Channels in multiples of 32, more of them in later layers, and some KV groups."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.ones(len(layout), dtype=torch.bool)
    layers = layout.decoder.num_layers
    for group in layout.groups:
        count = group.stop - group.start
        if layout.units[group.start].kind == "channel":
            share = 1.4 * sparsity * (0.5 + group.layer / layers)
            gone = round(share * count / 32) * 32
        else:
            gone = int(group.layer % 5 == 4)
        keep[group.start + torch.randperm(count, generator=generator)[:gone]] = False
    return keep


@pytest.mark.slow
def test_pruned_by_a_fifth(
    embedded_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(embedded_cache))
    directory = embedded_model()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    layout = Layout.of(model, attention="kv-group")
    keep = mild_mask(layout, 0.2)
    sparsity = layout.num_removed_parameters(keep) / layout.num_decoder_parameters
    assert 0.17 < sparsity < 0.25
    save_masked(tmp_path / "model", model, layout, keep, tokenizer=False)
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "model")
    result = to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert result.kind == "deci"
    # two bytes a parameter, and the tokenizer
    parameters = layout.num_model_parameters - layout.num_removed_parameters(keep)
    assert 0 < result.size_bytes - 2 * parameters < 4_000_000
    reference = reference_of(tmp_path / "model")
    found = check_llama_cpp(tmp_path / "model.gguf", reference, tolerance=TOLERANCE["f16"])
    assert found.greedy_equal >= found.greedy_tokens - 1 and found.tokenizer == "same"
