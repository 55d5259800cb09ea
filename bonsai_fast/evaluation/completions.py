"""What models write behind a few prompts: greedy, and so the same every time."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

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
    """A prompt, and what the parent and the pruned model wrote behind it."""

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
    """Let both models go on from the same prompts.

    Raises:
        ValueError: a prompt holds no token.
    """
    return [
        Completion(
            prompt,
            _greedy(dense, tokenizer, prompt, num_tokens),
            _greedy(pruned, tokenizer, prompt, num_tokens),
        )
        for prompt in prompts
    ]


def save_completions(run: Path, completions: list[Completion]) -> None:
    """Keep them in a run directory."""
    write_json(run / FILE, [asdict(completion) for completion in completions])


def load_completions(run: Path) -> list[Completion]:
    """What a run directory holds of them; an empty list if nothing.

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


@torch.inference_mode()
def _greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, num_tokens: int
) -> str:
    """At most so many tokens, up to the end of the text or of the context."""
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if input_ids.shape[1] == 0:
        raise ValueError(f"prompt: expected some text, got {prompt!r}")
    context = getattr(model.config, "max_position_embeddings", None)
    room = num_tokens if context is None else min(num_tokens, context - input_ids.shape[1])
    ends = model.config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    written: list[int] = []
    with evaluation_mode(model):
        cache = DynamicCache(config=model.config)
        step = input_ids
        while len(written) < room:
            logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits
            step = logits[:, -1:].argmax(dim=-1)
            token = int(step)
            if token in ends:
                break
            written.append(token)
    return str(tokenizer.decode(written, skip_special_tokens=True))
