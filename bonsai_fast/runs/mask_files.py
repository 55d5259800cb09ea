"""Keep masks on disk: one safetensors file each, which also names the layout of its units."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bonsai_fast.config.choices import AttentionUnit, ExpertUnit
from bonsai_fast.files import write_atomically
from bonsai_fast.models.layout import Layout, read_kind, recorded_kind
from bonsai_fast.models.submodels import pack, unpack


@dataclass(frozen=True, eq=False)
class SavedMask:
    """What a mask file holds.

    Attributes:
        keep: bool [P], True = kept.
        attention, experts, sublayers: the arguments of `Layout.of` that give the layout of these P
            units.
        removed: number of parameters removed.
    """

    keep: torch.Tensor
    attention: AttentionUnit
    experts: ExpertUnit
    sublayers: bool
    removed: int


def save_mask(path: str | os.PathLike[str], layout: Layout, keep: torch.Tensor) -> None:
    """Write a keep mask atomically.

    Args:
        path: of the file.
        layout: of the units.
        keep: bool [P].
    Raises:
        TypeError, ValueError: the mask is not bool, or not [P].
        OSError: the file cannot be written.
    """
    layout.check_mask(keep, dims=1)
    about = {
        "num_units": len(layout),
        "attention": recorded_kind(layout.attention),
        **({"experts": layout.experts} if layout.experts != "expert" else {}),
        "sublayers": layout.sublayers,
        "removed": layout.num_removed_parameters(keep),
    }
    # one entry, because safetensors shuffles several: the same mask is the same bytes
    metadata = {"layout": json.dumps(about, sort_keys=True)}
    write_atomically(Path(path), save({"keep": pack(keep[None])}, metadata))


def load_mask(path: str | os.PathLike[str]) -> SavedMask:
    """Read a keep mask.

    Raises:
        ValueError: not a mask of this project.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["layout"])
            keep = unpack(file.get_tensor("keep"), int(about["num_units"]))[0]
            attention = read_kind(about["attention"])
            if attention not in get_args(AttentionUnit):
                raise ValueError(f"attention {about['attention']!r} is unknown")
            experts = about.get("experts", "expert")
            if experts not in get_args(ExpertUnit):
                raise ValueError(f"experts {experts!r} is unknown")
            return SavedMask(
                keep,
                cast(AttentionUnit, attention),
                cast(ExpertUnit, experts),
                bool(about["sublayers"]),
                int(about["removed"]),
            )
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path}: expected a mask written by bonsai_fast: {error}") from error
