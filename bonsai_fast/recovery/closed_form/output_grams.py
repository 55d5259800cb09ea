"""Gram matrices of what the parent's output projections read, one decoder layer at a time."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from bonsai_fast.files import write_atomically
from bonsai_fast.layerwise import Sweep, UnusableInputsError
from bonsai_fast.models import Block, find_decoder
from bonsai_fast.recovery.closed_form.layer_calls import as_rows, token_weights, watched
from bonsai_fast.recovery.closed_form.weighted_gram import BLOCK_TOKENS, WeightedGram


@dataclass(frozen=True, eq=False)
class InputGram:
    """Weighted second moments of a projection's inputs; see `token_weights`.

    Attributes:
        gram: float32 [in, in], sum w (x - mean) (x - mean)^T / number of tokens; not centred where
            the projection has no bias, which alone could replace a mean.
        mean: float32 [in]; 0 without a bias.
    """

    gram: Tensor
    mean: Tensor


class OutputGrams:
    """Gram matrices of all output projections, in a directory.

    A matrix is as large as in_features squared, 4 bytes each: 0.3 GB in all for a model of 135M
    parameters, 15 GB for one of 7B, of which one is in memory at a time.

    Args:
        path: the directory; made when the first layer is saved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, block: Block) -> bool:
        """Whether the matrix of a sub-layer is on disk."""
        return self._file(block).is_file()

    def of(self, block: Block) -> InputGram:
        """The matrix of a sub-layer, on the CPU."""
        return InputGram(**load_file(self._file(block)))

    def collect(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        memory_budget: int | str | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Run text through the model's layers and save what is not on disk yet.

        Args:
            model: the parent, in memory or streamed.
            input_ids: int64 [B, T].
            memory_budget: as in `Sweep`.
            advance: called with 1 after every layer, for a progress bar.
        Raises:
            UnusableInputsError: inputs hold NaN or Inf.
            OSError: the disk is full.
        """
        decoder = find_decoder(model)
        layers: list[list[Block]] = [
            [b for b in (decoder.attention.get(n), decoder.mlp.get(n)) if b is not None]
            for n in range(decoder.num_layers)
        ]
        missing = [block for blocks in layers for block in blocks if not self.has(block)]
        if not missing:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_room(model, missing)
        sweep = Sweep(model, input_ids, memory_budget=memory_budget, folder=self.path)
        for number, blocks in enumerate(layers):
            modules = {
                block.output: cast(nn.Linear, model.get_submodule(block.output)) for block in blocks
            }
            sums = {
                name: WeightedGram(
                    linear.in_features, model.device, with_means=linear.bias is not None
                )
                for name, linear in modules.items()
            }
            for batch in sweep.batches:
                with watched(modules) as calls:
                    output = sweep.output(number, batch)
                weights = token_weights(output)
                for name, seen in calls.inputs.items():
                    rows = as_rows(seen).split(BLOCK_TOKENS)
                    for x, w in zip(rows, weights.split(BLOCK_TOKENS), strict=True):
                        sums[name].add(x, w)
                sweep.advance_batch(number, batch, output)
            for block in blocks:
                if self.has(block):
                    continue
                centred = modules[block.output].bias is not None
                found = _moments(sums[block.output], block.output, centred=centred)
                write_atomically(
                    self._file(block), save({"gram": found.gram.cpu(), "mean": found.mean.cpu()})
                )
            advance(1)

    def _check_room(self, model: PreTrainedModel, missing: list[Block]) -> None:
        """Raise OSError unless the disk has room for these matrices."""
        widths = [cast(nn.Linear, model.get_submodule(b.output)).in_features for b in missing]
        needed, free = 4 * sum(width**2 for width in widths), shutil.disk_usage(self.path).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"statistics need {needed / 2**30:.1f} GiB in {self.path}, {free / 2**30:.1f} GiB "
                "are free; choose an output on another disk, or --prior wanda, which needs none",
            )

    def _file(self, block: Block) -> Path:
        return self.path / f"{block.output}.safetensors"


def _moments(sums: WeightedGram, name: str, *, centred: bool) -> InputGram:
    if not sums.is_finite:
        raise UnusableInputsError(
            f"{name}: its inputs hold NaN or Inf; the model is broken or overflows in its dtype"
        )
    gram, mean = sums.gram(), (sums.inputs / sums.weight).float()
    if centred:
        gram.addr_(mean, mean, alpha=-float(sums.weight))
    return InputGram(gram.div_(sums.num_tokens), mean)


def check_projections(model: PreTrainedModel) -> None:
    """Refuse a model whose output projections are no nn.Linear, such as GPT-2's.

    Raises:
        ValueError: it names the first one.
    """
    decoder = find_decoder(model)
    blocks: list[Block] = [*decoder.attention.values(), *decoder.mlp.values()]
    for block in blocks:
        module = model.get_submodule(block.output)
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"compensation refits output projections of class Linear; {block.output} is a "
                f"{type(module).__name__}"
            )
