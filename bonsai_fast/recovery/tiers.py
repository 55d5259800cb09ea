"""All recovery tiers by name, and which of them run one after another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bonsai_fast.config.choices import RecoverName, Tier
from bonsai_fast.config.recover_options import PUBLISHED
from bonsai_fast.recovery.tier import RecoveryTier

TRAINED: tuple[Tier, ...] = ("distill", "bonsai", "wanda-lora", "mini-llm", "policy-gradient")


def _trained(name: Tier) -> RecoveryTier:
    from bonsai_fast.recovery.distill import DistillTier

    return DistillTier(name)


def _reconstruct() -> RecoveryTier:
    from bonsai_fast.recovery.reconstruct import Reconstruct

    return Reconstruct()


def _compensate() -> RecoveryTier:
    from bonsai_fast.recovery.closed_form import Compensate

    return Compensate()


# a function makes each, so that what a tier needs is imported only if it is used
TIERS: dict[Tier, Callable[[], RecoveryTier]] = {
    "compensate": _compensate,
    "reconstruct": _reconstruct,
    **{name: partial(_trained, name) for name in TRAINED},
}

STEPS: dict[RecoverName, tuple[Tier, ...]] = {
    "none": (),
    "compensate": ("compensate",),
    "reconstruct": ("compensate", "reconstruct"),
    "distill": ("compensate", "distill"),
    "bonsai": ("bonsai",),
    "wanda-lora": ("wanda-lora",),
    "mini-llm": ("mini-llm",),
    "policy-gradient": ("policy-gradient",),
}
# they refit layers to their parent's, one by one
BY_LAYER: tuple[Tier, ...] = ("compensate", "reconstruct")
# weights that are zero stay zero
KEEPS_ZEROS: tuple[RecoverName, ...] = ("reconstruct", "distill", *PUBLISHED)


def steps_of(name: RecoverName, *, zeros: bool = False, by_layer: bool = True) -> tuple[Tier, ...]:
    """The tiers that an option names, in the order in which they run.

    Args:
        name: the option.
        zeros: whether weights of the model are zeroed, and have to stay zero.
        by_layer: whether every layer of the model has one of its parent's to be compared with.
    Raises:
        ValueError: no tier of that name keeps zeros, or works without layers to compare.
    """
    if zeros and name != "none" and name not in KEEPS_ZEROS:
        raise ValueError(
            f"recover: {name} does not keep zeroed weights at zero; "
            f"expected none, {' or '.join(KEEPS_ZEROS)}"
        )
    steps = STEPS[name]
    if zeros:
        steps = tuple(tier for tier in steps if tier in KEEPS_ZEROS)
    if not by_layer:
        steps = tuple(tier for tier in steps if tier not in BY_LAYER)
    if name != "none" and not steps:
        raise ValueError(
            f"recover: {name} compares layers with their parent's, but the model has another "
            "number of layers or another hidden size; distill needs neither to be equal"
        )
    return steps


def tier_of(name: Tier) -> RecoveryTier:
    """A tier by its name.

    Raises:
        ValueError: this version does not have it.
    """
    if name not in TIERS:
        raise ValueError(
            f"recover: this version has no {name}; it has {', '.join(('none', *TIERS))}"
        )
    return TIERS[name]()
