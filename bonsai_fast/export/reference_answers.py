"""What a pruned model says, so that an engine's answers can be held against it."""

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
# tokens that a comparison needs room for, if the model takes that many
CONTEXT_LENGTH = 128
NUM_COMPARED = 10  # most likely tokens of each distribution


class CheckError(RuntimeError):
    """An engine does not run an exported model, or computes something else."""


@dataclass(frozen=True)
class Reference:
    """Prompts, and what the pruned model makes of them in float32.

    Attributes:
        texts: the prompts as text; empty where the model has no tokenizer.
        prompts: their token ids.
        greedy: the most likely continuation of each: int64 [N].
        logprobs: float32 [N, V] of each, before each of its tokens.
    """

    texts: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    greedy: tuple[tuple[int, ...], ...]
    logprobs: tuple[torch.Tensor, ...]

    @property
    def vocab_size(self) -> int:
        return self.logprobs[0].shape[-1]

    def prefixes(self) -> list[list[int]]:
        """Every prompt, and every prompt followed by some of its continuation."""
        return [
            [*prompt, *continuation[:length]]
            for prompt, continuation in zip(self.prompts, self.greedy, strict=True)
            for length in range(len(continuation))
        ]


@dataclass(frozen=True)
class Agreement:
    """How far an engine agrees with the pruned model in transformers, in float32.

    Attributes:
        engine: what ran the export, with its version.
        distributions: how many next-token distributions were compared.
        mean_logprob_difference, max_logprob_difference: absolute, over the `NUM_COMPARED` most
            likely tokens of each.
        greedy_tokens: how many greedy tokens were compared.
        greedy_equal: how many of them were the same.
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
    """Some texts as token ids, shortened to fit; random ids where there is no tokenizer."""
    room = min(CONTEXT_LENGTH, context_length(saved.config)) - NUM_GREEDY_TOKENS - 1
    if room < 1:
        raise ValueError(f"the model takes too few tokens to be compared: {room + 1} too few")
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
        likely: for every prefix the engine's most likely tokens, [id, log-probability] each.
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
            # what the engine does not list is no likelier than the last that it does
            differences.append(abs(found.get(identifier, min(lowest, value)) - value))
    # NaN is infinitely far from anything
    far = torch.tensor(differences, dtype=torch.float64).nan_to_num(float("inf"))
    mean, largest = float(far.mean()), float(far.max())
    return Agreement(engine, len(expected), mean, largest, len(greedy), equal, tokenizer)
