"""One wave: some sub-models on some sequences, whose hidden states are held at the same time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bonsai_fast.config.choices import Route
from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.mask_tree import MaskTree
from bonsai_fast.scoring.fused.parent import Structure
from bonsai_fast.scoring.fused.positions import Positions
from bonsai_fast.scoring.output_weights import SubmodelOutputs


@dataclass(frozen=True, eq=False, kw_only=True)
class Wave:
    """Consecutive leaves of a tree on some sequences.

    Attributes:
        structure: the model.
        tree: of its sub-models.
        leaves: which leaves of the tree.
        positions: of the sequences' length.
        chunk_rows: number of (sub-model, sequence) pairs that a sub-layer computes at once.
        route: how sub-layers with removed parts are computed; see `MaskScorer`.
        arithmetic: shared by all waves of a call.
        outputs: own output projections of the tree's sub-models; None: all have the parent's.
        held_outputs: number of these that a sub-layer may hold at once.
    """

    structure: Structure
    tree: MaskTree
    leaves: range
    positions: Positions
    chunk_rows: int
    route: Route
    arithmetic: Arithmetic
    outputs: SubmodelOutputs | None = None
    held_outputs: int = 1

    def embed(self, input_ids: Tensor) -> Tensor:
        """The buffer for the states of all leaves, with the embedded tokens in slot 0.

        Args:
            input_ids: int64 [B, T] on the device.
        Returns:
            [leaves, B, T, D].
        """
        embedded: Tensor = self.structure.embedding(input_ids)
        if self.structure.embedding_factor != 1.0:
            embedded = embedded * self.structure.embedding_factor
        states = self.arithmetic.buffer("states", len(self.leaves), *embedded.shape)
        states[0] = embedded
        return states
