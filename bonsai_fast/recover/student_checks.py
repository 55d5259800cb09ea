"""What is refused before a saved model is recovered: models that do not belong together."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.checkpoints.streaming import named_weights
from bonsai_fast.models import find_decoder
from bonsai_fast.scoring import SequenceNLL

# a text with numbers, spaces, code and other scripts, which tokenizers split differently
PROBE = "The 3rd  of May, 1987: naïve façade…\n\tif x_1 >= 0x2F: return f(x)  # Καλημέρα 你好 🙂"
# from this share of zeros on, they were put there to stay
ZEROED = 0.1


def check_quantised(config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError if a model is quantised, or was saved as such."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantised: recover the model before quantisation")


def check_tokenizers(pruned: PreTrainedTokenizerBase, parent: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless both give the same tokens."""
    if len(pruned) != len(parent) or pruned.get_vocab() != parent.get_vocab():
        raise ValueError(
            f"the pruned model's tokenizer has another vocabulary than its parent's "
            f"({len(pruned):,} and {len(parent):,} tokens): recovery needs the same one"
        )
    ids = [each(PROBE, add_special_tokens=False)["input_ids"] for each in (pruned, parent)]
    if ids[0] != ids[1]:
        raise ValueError(
            "the pruned model's tokenizer splits text differently from its parent's: recovery "
            "needs the same one"
        )


def check_heads(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ValueError unless both models predict as many tokens."""
    sizes = [SequenceNLL(model).head.weight.shape[0] for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the pruned model predicts {sizes[0]:,} tokens, its parent {sizes[1]:,}: "
            "recovery needs the same vocabulary"
        )


def is_alike(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Whether every layer of one has a layer of the other: as many, and of one hidden size."""
    layers = [find_decoder(model).num_layers for model in (student, teacher)]
    sizes = [SequenceNLL(model).head.weight.shape for model in (student, teacher)]
    return layers[0] == layers[1] and sizes[0] == sizes[1]


def zero_share(student: PreTrainedModel) -> float:
    """Share of zeros among the weights of the decoder's matrices."""
    path, zeros, total = find_decoder(student).path, 0, 0
    for name, parameter in named_weights(student):
        if name.startswith(f"{path}.") and parameter.dim() == 2:
            zeros += parameter.numel() - int(torch.count_nonzero(parameter))
            total += parameter.numel()
    return zeros / max(1, total)
