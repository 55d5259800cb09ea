"""A tiny parent on disk, with a real tokenizer, for tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: 256 of them behind <s> and </s>."""
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """Random, GQA 3:1, tied embeddings; units matter differently, so that choices are not ties."""
    sizes = {
        "vocab_size": 258, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 128, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4 * torch.rand(len(parameter), 1))
    return model


def save_tiny_parent(directory: Path, **changes: object) -> Path:
    """Write the model and its tokenizer; returns the directory."""
    tiny_llama(**changes).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory
