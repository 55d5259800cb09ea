"""One layer after another: output projections refitted on the pruned model's own states.

The text runs through parent and pruned model side by side. In every layer whose attention or MLP
lost parts, the output projection is refitted so that the residual stream behind it becomes the
parent's: the error of earlier layers is corrected, too. Attention comes first; the MLP then reads
what the new attention gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from bonsai_fast.checkpoints.streaming import exchanged_weights, weight
from bonsai_fast.layerwise import Sweep, UnusableInputsError
from bonsai_fast.models import AttentionBlock, Block, Decoder, find_decoder
from bonsai_fast.recovery.closed_form.layer_calls import (
    as_rows,
    silenced,
    token_weights,
    watched,
)
from bonsai_fast.recovery.closed_form.least_squares import WeightedSums, best_correction
from bonsai_fast.recovery.closed_form.residual_factor import residual_factor

# multiples of the mean of A's diagonal
RIDGES = (0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Refit:
    """What became of one output projection.

    Attributes:
        name: of the projection.
        ridge: chosen on other text; None: no ridge helped there, so it keeps its weights.
        error_before, error_after: weighted mean square of what the residual stream behind it lacks
            on that text, as a fraction of the residual stream.
    """

    name: str
    ridge: float | None
    error_before: float
    error_after: float


def blocks_of_layer(decoder: Decoder, number: int) -> list[Block]:
    """The sub-layers of a layer that exist, attention first."""
    found = (decoder.attention.get(number), decoder.mlp.get(number))
    return [block for block in found if block is not None]


def cut_blocks(teacher: PreTrainedModel, student: PreTrainedModel) -> list[list[Block]]:
    """For each layer, the student's sub-layers that lost parts but not all of them."""
    dense, pruned = find_decoder(teacher), find_decoder(student)
    found: list[list[Block]] = []
    for number in range(pruned.num_layers):
        widths = {
            type(block): _linear(teacher, block).in_features
            for block in blocks_of_layer(dense, number)
        }
        found.append(
            [
                block
                for block in blocks_of_layer(pruned, number)
                if _linear(student, block).in_features != widths[type(block)]
            ]
        )
    return found


class SequentialRefit:
    """Passes the layers of both models, refitting as it goes.

    Args:
        teacher, student: sweeps over the same text in the same batches, at layer 0.
        blocks: for each layer, the student's sub-layers to refit.
        num_fitted: sequences that corrections are found on; the others choose ridges.
    Attributes:
        refits: what became of each projection so far.
    """

    def __init__(
        self, teacher: Sweep, student: Sweep, blocks: list[list[Block]], num_fitted: int
    ) -> None:
        assert teacher.batches == student.batches
        self._teacher, self._student = teacher, student
        self._blocks, self._num_fitted = blocks, num_fitted
        self._dense, self._pruned = find_decoder(teacher.model), find_decoder(student.model)
        self._last = max((number for number, found in enumerate(blocks) if found), default=-1)
        self._factors: dict[type[Block], float | None] = {}
        self.refits: list[Refit] = []

    def pass_layer(
        self, number: int, recorded: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Refit a layer's projections and pass the layer with them.

        Args:
            number: of the layer, which is the next one.
            recorded: new weights by name from an earlier start; they are not computed again.
        Returns:
            new weights by parameter name, in the student's dtype, on the CPU; empty if nothing was
            refitted.
        Raises:
            UnusableInputsError: a model gives NaN or Inf.
        """
        new = dict(recorded or {})
        blocks = self._blocks[number] if recorded is None else []
        advanced = False
        for block in blocks:
            new |= self._refit(number, block, new)
            advanced = self._answers_for_layer(block)
        if not advanced and number < self._last:
            self._teacher.advance(number)
        with exchanged_weights(self._student.model, {number: new}.get):
            self._student.advance(number)
        return new

    def _refit(self, number: int, block: Block, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model = self._student.model
        with exchanged_weights(model, {number: new}.get):
            fitted, others = self._sums(number, block)
        try:
            equations, choosing = fitted.normal_equations(), others.normal_equations()
        except UnusableInputsError as error:
            raise UnusableInputsError(f"{block.output}: {error}") from error
        best = best_correction(equations, choosing, RIDGES)
        scale = others.mean_weight / len(equations.mean_residual)
        self.refits.append(
            Refit(
                block.output,
                best.ridge if best else None,
                scale * choosing.error(None),
                scale * choosing.error(best),
            )
        )
        if best is None:
            return {}
        found = {f"{block.output}.weight": best.weight}
        if fitted.with_bias:
            found[f"{block.output}.bias"] = best.bias
        return {
            name: (weight(model, name).detach().double() + change).to(model.dtype).cpu()
            for name, change in found.items()
        }

    def _sums(self, number: int, block: Block) -> tuple[WeightedSums, WeightedSums]:
        """Sums over the sequences to fit, and over those that choose."""
        linear = _linear(self._student.model, block)
        fitted, others = (
            WeightedSums(
                linear.in_features,
                linear.out_features,
                self._student.model.device,
                with_bias=linear.bias is not None,
            )
            for _ in range(2)
        )
        for batch in self._teacher.batches:
            found = self._missing(number, block, batch)
            rows = max(0, min(self._num_fitted, batch.stop) - batch.start)
            for sums, part in ((fitted, slice(rows)), (others, slice(rows, None))):
                sums.add(*(as_rows(x[part]) for x in found))
        return fitted, others

    def _answers_for_layer(self, block: Block) -> bool:
        """Whether no other sub-layer of the pruned layer follows; attention may precede an MLP."""
        return blocks_of_layer(self._pruned, block.layer)[-1].output == block.output

    def _missing(self, number: int, block: Block, batch: slice) -> tuple[Tensor, Tensor, Tensor]:
        """What the projection reads, what its output lacks, and each token's weight.

        Returns:
            [b, T, in], float32 [b, T, out] and float32 [b, T, 1].
        """
        factor, kind = self._factor(number, block), _kind(block)
        calls, behind = [], []
        is_last = self._answers_for_layer(block)
        for sweep, decoder in ((self._teacher, self._dense), (self._student, self._pruned)):
            modules = _modules(sweep.model, blocks_of_layer(decoder, number))
            following = None if is_last else modules["mlp"]
            with watched({kind: modules[kind]}) as seen, silenced(following):
                behind.append(sweep.output(number, batch))
            calls.append(seen)
        dense, pruned = behind
        if is_last:
            self._teacher.advance_batch(number, batch, dense)
        if factor is None:
            own = [seen.outputs[kind].view(dense.shape).float() for seen in calls]
            lacks = own[0] - own[1]
        else:
            lacks = (dense.float() - pruned.float()) / factor
        inputs = calls[1].inputs[kind].view(*dense.shape[:2], -1)
        return inputs, lacks, token_weights(dense).view(*dense.shape[:2], 1)

    def _factor(self, number: int, block: Block) -> float | None:
        """See `residual_factor`; the same for all layers."""
        if type(block) not in self._factors:
            student, rows = self._student, self._student.batches[0]
            modules = _modules(student.model, blocks_of_layer(self._pruned, number))
            output = modules.pop(_kind(block))
            self._factors[type(block)] = residual_factor(
                lambda: student.output(number, rows), output, next(iter(modules.values()), None)
            )
        return self._factors[type(block)]


def _kind(block: Block) -> str:
    return "attention" if isinstance(block, AttentionBlock) else "mlp"


def _modules(model: PreTrainedModel, blocks: list[Block]) -> dict[str, nn.Module]:
    """Output projections by kind."""
    return {_kind(block): _linear(model, block) for block in blocks}


def _linear(model: PreTrainedModel, block: Block) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(block.output))
