"""Whether code from elsewhere watches or changes what a model's modules compute."""

from __future__ import annotations

from torch import nn

# A hook with this attribute set to True does something that the fused engine does itself.
SKIPPABLE = "fused_engine_may_skip"


def has_foreign_hooks(model: nn.Module) -> bool:
    """Whether any module has a replaced `forward`, or a hook that is not marked as skippable.

    The fused engine reads weights and never calls the modules, so such hooks would not run.
    """
    return any(map(_is_hooked, model.modules()))


def _is_hooked(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "forward" in vars(module) or not all(getattr(hook, SKIPPABLE, False) for hook in hooks)
