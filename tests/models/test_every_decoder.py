"""Every causal language model class of transformers."""

from __future__ import annotations

import pytest
import torch
from surgery_cases import tokens
from zoo import TYPES, VOCABULARY, tiny_model

# their layers read keys and values of another model: they cannot run alone
ASSISTANTS = ("gemma4_assistant", "gemma4_unified_assistant")


@pytest.mark.parametrize("model_type", TYPES)
def test_a_tiny_model_computes_logits(model_type):
    model = tiny_model(model_type)
    assert model.num_parameters() < 5e6
    if model_type not in ASSISTANTS:
        with torch.no_grad():
            logits = model(input_ids=tokens(batch=4), use_cache=False).logits
        assert logits.isfinite().all() and logits.std() > 0.05
        assert logits.shape[-1] == VOCABULARY
