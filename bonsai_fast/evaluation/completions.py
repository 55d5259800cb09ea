"""Greedy completions of a few prompts by both models; they are the same every time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from bonsai_fast.files import write_json
from bonsai_fast.scoring.sequence_nll import evaluation_mode

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "The old lighthouse keeper opened the door and",
)
NUM_TOKENS = 32
FILE = "samples.json"


@dataclass(frozen=True)
class Completion:
    """A prompt, and how the parent and the pruned model continue it."""

    prompt: str
    dense: str
    pruned: str


def complete(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: tuple[str, ...] = PROMPTS,
    num_tokens: int = NUM_TOKENS,
) -> list[Completion]:
    """Let both models continue the same prompts.

    Raises:
        ValueError: a prompt holds no token.
    """
    return [
        Completion(
            prompt,
            _complete(dense, tokenizer, prompt, num_tokens),
            _complete(pruned, tokenizer, prompt, num_tokens),
        )
        for prompt in prompts
    ]


def save_completions(run: Path, completions: list[Completion]) -> None:
    """Write completions to a run directory."""
    write_json(run / FILE, [asdict(completion) for completion in completions])


def load_completions(run: Path) -> list[Completion]:
    """Read the completions of a run directory; an empty list if it has none.

    Raises:
        ValueError: the file is not one of ours.
    """
    path = run / FILE
    if not path.is_file():
        return []
    try:
        return [Completion(**found) for found in json.loads(path.read_text())]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected completions, as bonsai_fast writes them") from error


def _complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, num_tokens: int
) -> str:
    """At most `num_tokens` tokens, up to the end of the text or of the context."""
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if input_ids.shape[1] == 0:
        raise ValueError(f"prompt: expected some text, got {prompt!r}")
    context = getattr(model.config, "max_position_embeddings", None)
    room = num_tokens if context is None else min(num_tokens, context - input_ids.shape[1])
    ends = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    if room < 1:
        return ""
    written, _ = greedy(model, input_ids, room, ends)
    text = [token for token in written if token not in ends]
    return str(tokenizer.decode(text, skip_special_tokens=True))


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, input_ids: torch.Tensor, num_tokens: int, ends: Iterable[int] = ()
) -> tuple[list[int], torch.Tensor]:
    """Continue a prompt with the most likely token each time.

    The model's own generation configuration is left aside: some penalise repetition.

    Args:
        input_ids: int64 [1, T], on the model's device.
        num_tokens: at most this many, at least 1.
        ends: tokens to stop at.
    Returns:
        the new tokens, the end included, and float [N, V], the logits that each was chosen by.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=sorted(ends) or None)
    try:
        with evaluation_mode(model):
            found: Any = cast(Any, model).generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=num_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
    finally:
        model.generation_config = own
    return found.sequences[0, input_ids.shape[1] :].tolist(), torch.cat(found.logits)
