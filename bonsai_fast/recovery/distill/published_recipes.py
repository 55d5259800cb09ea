"""The training that four pruning papers publish for their pruned models.

Where a paper does not say a value, its code does, or the code that it builds on; what neither says
is in `NOT_PUBLISHED`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bonsai_fast.config.choices import RecoverKL, Tier
from bonsai_fast.recovery.distill.distillation_loss import LossTerms
from bonsai_fast.recovery.distill.recipe import Recipe

# of KL in Bonsai's loss, table 10
BONSAI_LAMBDA = 0.01


def bonsai(model_type: str, length: int, kl: RecoverKL) -> Recipe:
    """Bonsai, arXiv:2402.05406, section 4, table 10 and A.4.

    The loss is cross-entropy + 0.01 KL. Its code takes KL(parent || model), sums it over the tokens
    of a sequence and divides by the batch: the weight of the mean over tokens is 0.01 T. The paper
    prints KL(model || parent); here, with the mean over tokens, as the cross-entropy is one.

    Args:
        model_type: of the parent. "phi" is trained in all weights, as the paper does with Phi-2.
        length: T, tokens per sequence.
        kl: "code" or "paper".
    """
    if kl == "code":
        terms = LossTerms(cross_entropy=1.0, kl=BONSAI_LAMBDA * length)
    else:
        terms = LossTerms(cross_entropy=1.0, reverse_kl=BONSAI_LAMBDA)
    whole = model_type == "phi"
    usual = 2048 if whole else 512
    tokens = (100_000 if whole else 15_000) * usual
    return Recipe(
        name="bonsai",
        weights="all" if whole else "lora",
        terms=terms,
        rank=128,
        scale=4.0,
        dropout=0.05,
        head=True,
        learning_rate=1e-4,
        schedule="linear",
        batch=128,
        tokens=tokens,
        length=usual,
        published_tokens=tokens,
    )


def wanda_lora() -> Recipe:
    """Wanda, arXiv:2306.11695, appendix F.1: adapters of query and value projections."""
    tokens = 30_000 * 1024
    return Recipe(
        name="wanda-lora",
        weights="lora",
        adapted="query and value projections",
        terms=LossTerms(cross_entropy=1.0),
        dropout=0.05,
        learning_rate=1e-4,
        schedule="linear",
        batch=128,
        tokens=tokens,
        length=1024,
        published_tokens=tokens,
    )


def mini_llm() -> Recipe:
    """MINI-LLM, section 4: two epochs of Alpaca, here two of 50,000 sequences of 256 tokens."""
    tokens = 2 * 50_000 * 256
    return Recipe(
        name="mini-llm",
        weights="lora",
        terms=LossTerms(cross_entropy=1.0),
        dropout=0.05,
        learning_rate=1e-4,
        warmup_steps=100,
        batch=64,
        tokens=tokens,
        length=256,
        epochs=2,
        published_tokens=tokens,
    )


def policy_gradient() -> Recipe:
    """Structural pruning via policy gradient, appendix A.6: 4,000 samples of 1,024 tokens."""
    tokens = 4_000 * 1024
    return Recipe(
        name="policy-gradient",
        weights="lora",
        adapted="query and value projections",
        terms=LossTerms(cross_entropy=1.0),
        rank=16,
        scale=10 / 16,
        learning_rate=1e-4,
        schedule="linear",
        batch=64,
        tokens=tokens,
        length=1024,
        published_tokens=tokens,
    )


SIMPLE: Mapping[Tier, Callable[[], Recipe]] = {
    "wanda-lora": wanda_lora,
    "mini-llm": mini_llm,
    "policy-gradient": policy_gradient,
}

NOT_PUBLISHED: Mapping[Tier, str] = {
    "mini-llm": "batch, warm-up and dropout are those of LLM-Pruner; the paper does not say them",
    "policy-gradient": "learning rate and batch are those of LLM-Pruner, adapters are on query and "
    "value projections as in peft; the paper does not say them",
}
