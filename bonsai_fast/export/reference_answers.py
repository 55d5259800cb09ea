"""A pruned model's answers in transformers, and how an engine's answers compare with them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bonsai_fast.checkpoints.saved_model import SavedModel, open_saved
from bonsai_fast.evaluation.completions import greedy
from bonsai_fast.export.gguf.architecture import context_length

TEXTS = (
    "The lighthouse keeper wrote in his log every evening, and",
    "To bake bread you need flour, water, salt and",
    "In 1969 two men walked on the Moon while a third",
    "def largest(numbers):\n    result = numbers[0]\n    for",
)
NUM_GREEDY_TOKENS = 12
# context of a comparison, in tokens; less if the model takes fewer
CONTEXT_LENGTH = 128
NUM_COMPARED = 10  # most likely tokens of each distribution


class CheckError(RuntimeError):
    """An engine does not run an exported model, or computes something else."""


@dataclass(frozen=True)
class Reference:
    """Prompts, and the pruned model's answers in float32.

    Attributes:
        texts: the prompts as text; empty if the model has no tokenizer.
        prompts: their token ids.
        greedy: the greedy continuation of each prompt, N token ids.
        logprobs: for each prompt float32 [N, V], what each of its greedy tokens was chosen by.
    """

    texts: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    greedy: tuple[tuple[int, ...], ...]
    logprobs: tuple[torch.Tensor, ...]

    @property
    def vocab_size(self) -> int:
        return self.logprobs[0].shape[-1]

    def prefixes(self) -> list[list[int]]:
        """Every prompt, followed by 0 to N - 1 tokens of its continuation."""
        return [
            [*prompt, *continuation[:length]]
            for prompt, continuation in zip(self.prompts, self.greedy, strict=True)
            for length in range(len(continuation))
        ]


@dataclass(frozen=True)
class Agreement:
    """How far an engine agrees with the pruned model in transformers, in float32.

    Attributes:
        engine: name and version.
        distributions: number of next-token distributions that were compared.
        mean_logprob_difference, max_logprob_difference: absolute, over the `NUM_COMPARED` most
            likely tokens of each distribution.
        greedy_tokens: number of greedy tokens that were compared.
        greedy_equal: how many of those are the same.
        tokenizer: "same" or "not compared".
    """

    engine: str
    distributions: int
    mean_logprob_difference: float
    max_logprob_difference: float
    greedy_tokens: int
    greedy_equal: int
    tokenizer: str = "not compared"

    def __str__(self) -> str:
        return (
            f"{self.engine}: log-probabilities of the {NUM_COMPARED} most likely next tokens at "
            f"{self.distributions} places differ by {self.mean_logprob_difference:.2g} (mean), "
            f"{self.max_logprob_difference:.2g} (largest); greedy tokens "
            f"{self.greedy_equal}/{self.greedy_tokens} equal; tokenizer {self.tokenizer}"
        )


def reference_of(directory: str | os.PathLike[str]) -> Reference:
    """Run the saved model of a run or a directory in float32 on the CPU.

    Raises:
        ValueError: no such model.
    """
    saved = open_saved(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(saved.directory, dtype=torch.float32)
    texts, prompts = _prompts(saved)
    answers = [greedy(model, torch.tensor([prompt]), NUM_GREEDY_TOKENS) for prompt in prompts]
    return Reference(
        texts,
        prompts,
        tuple(tuple(tokens) for tokens, _ in answers),
        tuple(logits.float().log_softmax(-1) for _, logits in answers),
    )


def _prompts(saved: SavedModel) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Texts and their token ids, shortened to fit; random ids if there is no tokenizer."""
    room = min(CONTEXT_LENGTH, context_length(saved.config)) - NUM_GREEDY_TOKENS - 1
    if room < 1:
        needed = NUM_GREEDY_TOKENS + 2
        raise ValueError(
            f"a check needs a context of {needed} tokens, the model has {needed + room - 1}"
        )
    if not (saved.directory / "tokenizer.json").is_file():
        generator = torch.Generator().manual_seed(0)
        size = (len(TEXTS), min(8, room))
        ids = torch.randint(3, saved.config.vocab_size, size, generator=generator)
        return (), tuple(tuple(row) for row in ids.tolist())
    tokenizer: Any = AutoTokenizer.from_pretrained(saved.directory)
    texts, prompts = [], []
    for text in TEXTS:
        while len(tokenizer(text).input_ids) > room and len(text) > 1:
            text = text[: len(text) * 3 // 4]
        texts.append(text)
        prompts.append(tuple(tokenizer(text).input_ids))
    return tuple(texts), tuple(prompts)


def compare(
    engine: str,
    reference: Reference,
    likely: Sequence[Sequence[Sequence[float]]],
    tokenizer: str = "not compared",
) -> Agreement:
    """Compare an engine's answers to `Reference.prefixes`.

    Args:
        likely: for every prefix, the engine's most likely tokens as [id, log-probability].
        tokenizer: result of comparing the tokenizers.
    """
    expected = torch.cat(reference.logprobs)
    greedy = [token for continuation in reference.greedy for token in continuation]
    differences: list[float] = []
    equal = 0
    for row, token, pairs in zip(expected, greedy, likely, strict=True):
        found = {int(identifier): value for identifier, value in pairs}
        lowest = min(found.values())
        equal += max(found, key=lambda identifier: found[identifier]) == token
        wanted = row.topk(min(NUM_COMPARED, len(row)))
        for value, identifier in zip(wanted.values.tolist(), wanted.indices.tolist(), strict=True):
            # a token that the engine does not list is at most as likely as its last one
            differences.append(abs(found.get(identifier, min(lowest, value)) - value))
    # NaN counts as an infinite difference
    far = torch.tensor(differences, dtype=torch.float64).nan_to_num(float("inf"))
    mean, largest = float(far.mean()), float(far.max())
    return Agreement(engine, len(expected), mean, largest, len(greedy), equal, tokenizer)
