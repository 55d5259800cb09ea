"""From who reads what to cuts: which part of a sub-layer owns each index of its parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from bonsai_fast.models.blocks import Cut

# Owners of an index that no part owns: nothing reads it here, or all parts do.
UNREAD, SHARED = -1, -2


class MixedPartsError(ValueError):
    """The parts of a sub-layer cannot be removed one by one; the message says why."""


@dataclass(frozen=True)
class Names:
    """From a decoder's own paths to those of the model, and which parameters exist there.

    Attributes:
        aliases: of modules that have more than one path: the other ones -> the first.
    """

    prefix: str
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, prefix: str) -> Names:
        """The names of a model whose decoder has the path `prefix`."""
        first: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            first.setdefault(id(module), path)
        aliases = {
            path: first[id(module)]
            for path, module in model.named_modules(remove_duplicate=False)
            if first[id(module)] != path
        }
        return cls(prefix, {n: tuple(p.shape) for n, p in model.named_parameters()}, aliases)

    def full(self, path: str) -> str:
        """Path of a module or parameter inside the decoder -> its path inside the model."""
        path = f"{self.prefix}.{path}" if self.prefix else path
        owner, _, name = path.rpartition(".")
        if path in self.aliases:
            return self.aliases[path]
        return f"{self.aliases[owner]}.{name}" if owner in self.aliases else path


def matrix_cuts(names: Names, path: str, rows: Tensor, *, transposed: bool) -> list[Cut]:
    """Cuts of a projection whose rows have these owners, int64 [rows]; its bias included."""
    if bool((rows < 0).all()):
        return []
    if bool((rows < 0).any()):
        raise MixedPartsError(f"some rows of {_last(path)} belong to no unit")
    found = [Cut(names.full(f"{path}.weight"), 1 if transposed else 0, rows)]
    if names.full(f"{path}.bias") in names.shapes:
        found.append(Cut(names.full(f"{path}.bias"), 0, rows))
    return found


def parameter_cut(names: Names, name: str, owners: Tensor, num_parts: int) -> Cut | None:
    """The cut of any other parameter, each of whose elements has an owner.

    Args:
        owners: int64 like the parameter; UNREAD and SHARED are no part.
        num_parts: of the sub-layer.
    """
    if bool((owners < 0).all()):
        return None
    for dim in range(owners.dim()):
        lines = owners.movedim(dim, 0).reshape(owners.shape[dim], -1)
        if bool((lines == lines[:, :1]).all()) and bool((lines >= 0).all()):
            owner = lines[:, 0].clone()
            if num_parts > 1 and bool((owner == owner[0]).all()):
                raise MixedPartsError(f"{_short(name)} is a parameter of one unit alone")
            if names.full(name) not in names.shapes:
                raise MixedPartsError(f"{_short(name)} is a buffer with values for single units")
            return Cut(names.full(name), dim, owner)
    raise MixedPartsError(f"some elements of {_short(name)} belong to no unit")


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _short(name: str) -> str:
    return ".".join(name.split(".")[-2:])
