"""The recipe of a tier, from its name and the options."""

from __future__ import annotations

from dataclasses import replace

from bonsai_fast.config.choices import RecoverWeights, Tier
from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.recovery.distill.distillation_loss import LossTerms
from bonsai_fast.recovery.distill.published_recipes import SIMPLE, bonsai
from bonsai_fast.recovery.distill.recipe import Recipe
from bonsai_fast.recovery.recovery_task import TextWanted

# most of what distillation brings comes within the first 20,000 tokens
TOKENS = 40_960
LEARNING_RATES: dict[RecoverWeights, float] = {"lora": 1e-3, "all": 1e-4, "norms": 1e-3}


def recipe_of(tier: Tier, options: RecoverOptions, *, model_type: str, length: int) -> Recipe:
    """Hyper-parameters of a tier.

    Args:
        tier: "distill" or a published one.
        options: of the run.
        model_type: of the parent.
        length: tokens per sequence.
    Raises:
        ValueError: a rank is given where no adapters are trained, or the tokens are fewer than one
            sequence.
    """
    if tier == "distill":
        recipe = _distill(options)
    elif tier == "bonsai":
        recipe = bonsai(model_type, length, options.recover_kl or "code")
    else:
        recipe = SIMPLE[tier]()
    tokens = options.recover_tokens
    if tokens is not None and tokens < length:
        raise ValueError(
            f"recover_tokens: expected at least one sequence of {length} tokens, got {tokens}"
        )
    return recipe if tokens is None else recipe.with_tokens(tokens, length)


def text_of(tier: Tier, options: RecoverOptions) -> TextWanted:
    """The text that a tier trains on."""
    recipe = recipe_of(tier, options, model_type="", length=1)
    return TextWanted(tokens=-(-recipe.tokens // recipe.epochs), length=recipe.length)


def _distill(options: RecoverOptions) -> Recipe:
    weights = options.recover_weights
    if options.recover_rank is not None and weights != "lora":
        raise ValueError(f"recover_rank: recover_weights={weights} trains no adapters; omit it")
    recipe = Recipe(
        name="distill",
        weights=weights,
        terms=LossTerms(
            kl=1.0,
            cross_entropy=options.recover_cross_entropy or 0.0,
            hidden=options.recover_hidden or 0.0,
        ),
        learning_rate=options.recover_rate or LEARNING_RATES[weights],
        batch=options.recover_batch or 1,
        tokens=TOKENS,
    )
    return recipe if options.recover_rank is None else replace(recipe, rank=options.recover_rank)
