"""Greedy completions: the most likely token each time, whatever the model's own settings say."""

from __future__ import annotations

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from transformers import PreTrainedModel

from bonsai_fast.evaluation.completions import complete, greedy

PROMPT = torch.tensor([[5, 100, 40, 17]])


def by_hand(model: PreTrainedModel, count: int) -> tuple[list[int], torch.Tensor]:
    """Without a cache: the whole text again for every token."""
    ids, rows = PROMPT, []
    with torch.inference_mode():
        for _ in range(count):
            rows.append(model(ids).logits[0, -1])
            ids = torch.cat([ids, rows[-1].argmax().view(1, 1)], dim=1)
    return ids[0, PROMPT.shape[1] :].tolist(), torch.stack(rows)


def test_the_most_likely_tokens_and_their_logits() -> None:
    model = tiny_llama()
    model.generation_config.repetition_penalty = 5.0
    own = model.generation_config
    tokens, logits = greedy(model, PROMPT, 10)
    expected, rows = by_hand(model, 10)
    assert tokens == expected and model.generation_config is own
    torch.testing.assert_close(logits, rows, atol=1e-5, rtol=1e-5)


def test_it_stops_at_an_end_and_at_the_context() -> None:
    model = tiny_llama(max_position_embeddings=8)
    tokens, _ = by_hand(model, 4)
    assert greedy(model, PROMPT, 4, {tokens[2]})[0] == tokens[: tokens.index(tokens[2]) + 1]
    model.config.eos_token_id = [1, 300]
    tokenizer = byte_tokenizer()
    text = tokenizer.decode(PROMPT[0].tolist())
    found = complete(model, model, tokenizer, (text,), num_tokens=9)
    assert found[0].prompt == text and found[0].dense == found[0].pruned
    assert len(tokenizer(found[0].dense).input_ids) <= 4
    long = complete(model, model, tokenizer, ("too long for it",))
    assert long[0].dense == ""
    with pytest.raises(ValueError, match="expected some text, got ''"):
        complete(model, model, tokenizer, ("",))
