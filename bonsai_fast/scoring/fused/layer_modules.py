"""The modules of one decoder layer, and which of its tensors have been accounted for."""

from __future__ import annotations

from torch import nn

from bonsai_fast.scoring.fused.parent import Norm, Projection, UnsupportedStructureError
from bonsai_fast.scoring.fused.read_norm import is_norm, read_norm


class LayerModules:
    """Reads modules of a layer by name, and remembers which.

    Args:
        layer: the decoder layer.
        path: its path in the model, for errors.
    """

    def __init__(self, layer: nn.Module, path: str) -> None:
        self.layer, self.path = layer, path
        self._seen: set[str] = set()

    def inside(self, path: str) -> str:
        """The name in the layer of a module with this path in the model."""
        return path.removeprefix(f"{self.path}.")

    def linear(self, name: str) -> Projection:
        """A projection."""
        module = self.layer.get_submodule(name)
        if type(module) is not nn.Linear:
            raise UnsupportedStructureError(
                f"{name} is a {type(module).__name__}, not an nn.Linear"
            )
        self._see(name, module)
        return Projection(module.weight, module.bias)

    def norm(self, name: str) -> Norm:
        """A norm."""
        module = self.layer.get_submodule(name)
        self._see(name, module)
        return read_norm(module, f"{self.path}.{name}")

    def whole(self, name: str) -> nn.Module:
        """A module that is called as it is, so that nothing in it needs to be known."""
        module = self.layer.get_submodule(name)
        self._see(name, module)
        return module

    def norms(self) -> set[str]:
        """Names of the norms beside the sub-layers."""
        return {name for name, module in self.layer.named_children() if is_norm(module)}

    def left_bias(self, name: str) -> nn.Parameter | None:
        """The output bias that was left of a removed sub-layer."""
        module = getattr(self.layer, name, None)
        if not isinstance(module, nn.Module):
            raise UnsupportedStructureError(f"{self.path} has no {name}")
        self._see(name, module)
        parameters = dict(module.named_parameters())
        if any(not each.endswith(".bias") for each in parameters) or len(parameters) > 1:
            raise UnsupportedStructureError(
                f"{self.path}.{name}: expected at most a bias, left over from a removed sub-layer"
            )
        return next(iter(parameters.values()), None)

    def check_all_seen(self) -> None:
        """Refuse a layer with a parameter or buffer that nothing has read.

        Raises:
            UnsupportedStructureError: there is one.
        """
        for kind, tensors in (
            ("parameter", self.layer.named_parameters()),
            ("buffer", self.layer.named_buffers()),
        ):
            left = sorted({name for name, _ in tensors} - self._seen)
            if left:
                raise UnsupportedStructureError(f"{self.path} has an unknown {kind} {left[0]}")

    def _see(self, name: str, module: nn.Module) -> None:
        self._seen.update(f"{name}.{tensor}" for tensor, _ in module.named_parameters())
        self._seen.update(f"{name}.{tensor}" for tensor, _ in module.named_buffers())
