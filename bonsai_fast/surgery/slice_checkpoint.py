"""Remove units from a checkpoint on disk, with the result of load, `remove_units` and save.

The model is only built on the meta device, which gives layout, slices, class and configuration.
Weights are read and written block by block.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from bonsai_fast.checkpoints.meta_model import AnyStored, ParentOnDisk, open_parent
from bonsai_fast.checkpoints.safetensors_writer import MAX_SHARD_SIZE, write_model_weights
from bonsai_fast.checkpoints.saved_names import SavedFrom, saved_names
from bonsai_fast.config.choices import AttentionUnit, ExpertUnit
from bonsai_fast.console import Reporter
from bonsai_fast.models.layout import Layout
from bonsai_fast.ops.native import take
from bonsai_fast.surgery.kept import Kept, kept_by, kept_positions
from bonsai_fast.surgery.remove_units import move_in
from bonsai_fast.surgery.save import model_directory
from bonsai_fast.surgery.skeleton import build_structure

BLOCK_BYTES = 1 << 24
TOKENIZER_FILES = (
    *("tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.*"),
    *("chat_template*", "additional_chat_templates", "tokenization_*.py"),
)


@dataclass(frozen=True)
class SliceResult:
    """What was written.

    Attributes:
        output: directory of the smaller model.
        parameters, parameters_dense: number of parameters of the whole model, after and before.
        num_bytes: total size of the written weights.
        unknown_tensors: names of stored tensors that do not belong to the model, copied unchanged.
        seconds: wall time.
    """

    output: str
    parameters: int
    parameters_dense: int
    num_bytes: int
    unknown_tensors: tuple[str, ...]
    seconds: float


@torch.no_grad()
def slice_checkpoint(
    parent_dir: str | os.PathLike[str],
    keep_mask: torch.Tensor,
    output_dir: str | os.PathLike[str],
    *,
    attention: AttentionUnit = "head",
    experts: ExpertUnit = "expert",
    sublayers: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    report: dict[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> SliceResult:
    """Prune a saved model by a keep mask, from directory to directory.

    The files equal those of `from_pretrained(parent_dir, dtype="auto")`, `remove_units` and
    `save_pretrained`, byte for byte, but only one block of one tensor is in memory. Also copied are
    stored tensors that do not belong to the model, metadata of the weight files, and the tokenizer.
    The output appears in one step when it is complete.

    Args:
        parent_dir: a model in safetensors, sharded or not, dense or pruned.
        keep_mask: bool [P], True = kept, of `Layout.of` with the three arguments below.
        output_dir: a new or empty directory.
        attention, experts, sublayers: which layout the mask belongs to.
        max_shard_size: largest weight file, such as "5GB"; a larger tensor gets its own.
        dtype: of the result; the parent's own if None.
        trust_remote_code: build the model from code that the parent carries.
        overwrite: replace a model that bonsai_fast saved there before; never anything else.
        report: content of `bonsai_report.json`; the kept heads and channels if None.
        reporter: shows progress; none is shown if None.
    Raises:
        ValueError: the mask does not fit; the parent is quantized, incomplete, not in safetensors,
            or cannot express the result.
        TypeError: the mask is not bool.
        FileExistsError: `output_dir` holds something that may not be replaced.
        OSError: it cannot be written, for example because the disk is full; no part of it is left.
    """
    started = time.perf_counter()
    parent = open_parent(Path(parent_dir), dtype=dtype, trust_remote_code=trust_remote_code)
    layout = Layout.of(parent.model, attention=attention, experts=experts, sublayers=sublayers)
    layout.check_mask(keep_mask, dims=1)
    kept = kept_by(parent.model, layout, keep_mask.cpu())
    child = build_structure(parent.model, layout.decoder, kept)
    move_in(child, parent.model, kept)
    if child.can_generate():
        child.generation_config = parent.model.generation_config
    if report is None:
        positions = dict(enumerate(kept_positions(layout, keep_mask)))
        report = {"parent": str(parent_dir), "kept": positions}
    plan = _plan(parent, child, kept)
    tensors = {name: part.result for name, part in plan.items()}
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    origin = str(parent_dir)
    with model_directory(output_dir, origin, report=report, overwrite=overwrite) as scratch:
        if (free := shutil.disk_usage(scratch).free) < num_bytes:
            what = f"{num_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
            raise OSError(errno.ENOSPC, f"the disk is full: {what}")
        # configuration, generation configuration and Python files; the weights come below
        child.save_pretrained(scratch, state_dict={})
        _copy_tokenizer(Path(parent_dir), scratch)
        _write_weights(scratch, plan, parent, child.num_parameters(), max_shard_size, reporter)
    return SliceResult(
        output=str(output_dir),
        parameters=child.num_parameters(),
        parameters_dense=layout.num_model_parameters,
        num_bytes=num_bytes,
        unknown_tensors=parent.unknown,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """A tensor of the result, on the meta device; its source, and the (dim, index) that is kept.

    `part` says which part of the kept tensor is saved under the result's name.
    """

    result: torch.Tensor
    source: AnyStored
    cut: tuple[int, torch.Tensor] | None
    part: SavedFrom | None = None

    def blocks(self) -> Iterator[torch.Tensor]:
        """Rows of the result, in order."""
        dim, index = self.cut or (0, None)
        if self.part is not None and self.part.expert is not None:
            yield self._expert(dim, index)
            return
        for first, block in self.source.blocks(BLOCK_BYTES):
            if index is not None and dim == 0:
                inside = (index >= first) & (index < first + len(block))
                block = take(block, index[inside] - first, 0)
            elif index is not None:
                block = take(block, index, dim)
            yield block.to(self.result.dtype)

    def _expert(self, dim: int, index: torch.Tensor | None) -> torch.Tensor:
        """Some rows of the matrix of one kept expert."""
        assert self.part is not None and self.part.expert is not None
        expert = self.part.expert
        if index is not None and dim == 0:
            expert = int(index[expert])
        matrix = self.source.row(expert, BLOCK_BYTES)
        if index is not None and dim > 0:
            matrix = take(matrix, index, dim - 1)
        rows = slice(self.part.first_row, self.part.first_row + self.part.num_rows)
        return matrix[rows].to(self.result.dtype)


def _plan(parent: ParentOnDisk, child: PreTrainedModel, kept: Kept) -> dict[str, _Part]:
    """Every tensor of the result by its name on disk, in the order of saving."""
    state = remove_tied_weights_from_state_dict(child.state_dict(), child)
    plan = {
        stored: _Part(
            part.of(state[part.name]), parent.tensors[part.name], kept.slices.get(part.name), part
        )
        for stored, part in saved_names(child, state).items()
    }
    for name in parent.unknown:
        source = parent.checkpoint.tensors[name]
        result = torch.empty(source.shape, dtype=source.dtype, device="meta")
        plan[name] = _Part(result, source, None)
    return plan


def _write_weights(
    directory: Path,
    plan: dict[str, _Part],
    parent: ParentOnDisk,
    num_parameters: int,
    max_shard_size: int | str,
    reporter: Reporter | None,
) -> None:
    with (reporter or Reporter(quiet=True)).bar("tensors", total=len(plan)) as advance:

        def blocks(name: str) -> Iterator[torch.Tensor]:
            yield from plan[name].blocks()
            advance(1)

        write_model_weights(
            directory,
            {name: part.result for name, part in plan.items()},
            blocks,
            num_parameters=num_parameters,
            metadata={**parent.checkpoint.metadata, "format": "pt"},
            max_shard_size=max_shard_size,
        )


def _copy_tokenizer(source: Path, target: Path) -> None:
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)
