"""Under which names a model's tensors are saved, and which of them are parts of one tensor.

transformers keeps the experts of a layer in one tensor, [experts, rows, columns], and saves some
families as they were published: a matrix for each expert and projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


@dataclass(frozen=True)
class SavedFrom:
    """What a saved tensor is, in a model's state.

    Attributes:
        name: of the tensor in the state.
        expert: index of its first dimension; None: the tensor is saved as it is.
        first_row, num_rows: rows of this expert's matrix; 0 and 0 for a whole tensor.
    """

    name: str
    expert: int | None = None
    first_row: int = 0
    num_rows: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The saved part of the tensor of that name, a view."""
        if self.expert is None:
            return tensor
        return tensor[self.expert, self.first_row : self.first_row + self.num_rows]


def saved_names(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, SavedFrom]:
    """What every saved tensor is made of, by its name in the files, in the order of saving.

    Args:
        model: tells how its family is saved.
        state: its state on the meta device, or a part of it.
    Raises:
        ValueError: saving changes more than the names of tensors, and splits no experts either.
    """
    saved = revert_weight_conversion(model, dict(state))
    own = {id(tensor): name for name, tensor in state.items()}
    found = {stored: SavedFrom(own[id(t)]) for stored, t in saved.items() if id(t) in own}
    whole = {each.name for each in found.values()}
    for name in state.keys() - whole:
        found |= _parts(model, name, state[name])
    if found.keys() != saved.keys():
        raise ValueError(
            f"{type(model).__name__} is saved with other tensors than it has in memory: load the "
            "model and use remove_units"
        )
    return {stored: found[stored] for stored in saved}


def _parts(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, SavedFrom]:
    """How a tensor is split; nothing if not into rows of single experts."""
    if tensor.dim() != 3:
        return {}
    experts, rows, _ = tensor.shape
    # one column of row numbers: they say where the parts come from
    numbers = torch.arange(experts * rows).view(experts, rows, 1)
    parts: dict[str, SavedFrom] = {}
    for stored, part in revert_weight_conversion(model, {name: numbers}).items():
        flat = part.flatten()
        expert, row = divmod(int(flat[0]), rows)
        in_order = torch.equal(flat, flat[0] + torch.arange(len(flat)))
        if part.shape != (len(flat), 1) or not in_order or row + len(flat) > rows:
            return {}
        parts[stored] = SavedFrom(name, expert, row, len(flat))
    total = sum(part.num_rows for part in parts.values())
    starts = {(part.expert, part.first_row) for part in parts.values()}
    return parts if total == experts * rows and len(starts) == len(parts) else {}
