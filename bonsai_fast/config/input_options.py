"""Options of every command that computes losses: text, memory, seed."""

from __future__ import annotations

from dataclasses import dataclass

from bonsai_fast.config.options import DEVICE, SEARCH, TEXT, option


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Text that is read, memory for it, and the seed."""

    seed: int = option(0, "Seed of all random numbers.", group=SEARCH, minimum=0)
    calibration: str = option(
        "builtin",
        "Text to read: wikitext2, c4, hf:NAME[:CONFIG] (on the hub), FILE.txt, FILE.jsonl, "
        "self (the model's own) or builtin.",
        group=TEXT,
    )
    evaluation: str | None = option(
        None,
        "Text to measure perplexity on, named likewise.",
        group=TEXT,
        shown="the last quarter of the calibration text, which methods then do not read",
    )
    evaluation_tokens: int = option(8192, "Tokens of it to measure on.", group=TEXT, minimum=1)
    memory_budget: str | None = option(
        None,
        "Besides the weights, such as 800MB.",
        group=DEVICE,
        shown="2GiB; half of a GPU's",
        value="SIZE",
    )
