"""The fused engine: layer by layer over all sub-models of a wave, by a runner of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.config.choices import Precision, Route
from bonsai_fast.files import write_json
from bonsai_fast.models import MLPBlock
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.divergence import ParentReference
from bonsai_fast.scoring.fused.arithmetic.products import products
from bonsai_fast.scoring.fused.arithmetic.workspace import Workspace
from bonsai_fast.scoring.fused.choose_route import cheapest, without_logits
from bonsai_fast.scoring.fused.foreign_hooks import has_foreign_hooks
from bonsai_fast.scoring.fused.gpu_rates import Rates, rates_of
from bonsai_fast.scoring.fused.mask_tree import MaskTree
from bonsai_fast.scoring.fused.operands.gather import gathers_heads
from bonsai_fast.scoring.fused.operands.packed import PackedSublayers, PackedTree, packs_of
from bonsai_fast.scoring.fused.parent import Structure, read_structure
from bonsai_fast.scoring.fused.positions import Positions
from bonsai_fast.scoring.fused.schedule import FusedWorkingSet, Schedule
from bonsai_fast.scoring.fused.self_check import check_structure
from bonsai_fast.scoring.fused.sublayers import normalize
from bonsai_fast.scoring.fused.wave import Wave
from bonsai_fast.scoring.hooks_engine import HooksEngine
from bonsai_fast.scoring.interface import Measure, Progress
from bonsai_fast.scoring.sequence_nll import SequenceNLL, evaluation_mode
from bonsai_fast.scoring.working_set import MAX_TOKENS

# leaves of a wave, if sequences have to be split: so many share prefixes well
MIN_LEAVES = 16
# a stretch of text is scored under so many sub-models in one call at most, so that little is lost
# when a run is interrupted
MAX_SUBMODELS_PER_CHUNK = 16


class FusedEngine:
    """Scores sub-models of LLaMA-like parents; what they share is computed once.

    The modules of the model are read, not called: while foreign hooks stand on them, the model is
    run as it is instead.

    Args:
        layout: the units.
        nll: the model and its loss.
        memory_budget: bytes.
        route: how masked sub-layers are computed.
        precision: of their products; see `products`.
    Attributes:
        kernels: whether the project's own ops do what PyTorch's functions could do as well: on
            CUDA, where those are kernels; True elsewhere runs their plain versions.
    Raises:
        UnsupportedStructureError: the model is of another kind.
    """

    name = "fused"

    def __init__(
        self,
        layout: Layout,
        nll: SequenceNLL,
        memory_budget: int,
        route: Route = "auto",
        precision: Precision = "full",
    ) -> None:
        self.layout, self.nll, self.route = layout, nll, route
        self.kernels = nll.head.weight.device.type == "cuda"
        self._budget = memory_budget
        self._hooks = HooksEngine(layout, nll, memory_budget)
        self._multiply = products(precision, nll.head.weight.device)
        self._low = precision != "full"
        self._rates: Rates | None = None
        structure = self._structure()
        with evaluation_mode(nll.model):
            check_structure(nll.model, layout, structure)

    def rows_per_batch(self, length: int) -> int:
        """(sub-model, sequence) pairs whose states are held at once."""
        return self._schedule(length).wave_rows

    def submodels_per_chunk(self, sequences: int, length: int) -> int:
        """See `Engine.submodels_per_chunk`."""
        submodels = self.rows_per_batch(length) // sequences
        if stream_of(self.nll.model) is None:  # else every call reads all weights
            most = MAX_SUBMODELS_PER_CHUNK
            if self.kernels:  # a GPU is done with few in no time
                most = max(most, MAX_TOKENS["cuda"] // (sequences * length))
            submodels = min(most, submodels)
        return max(1, submodels)

    @property
    def rates(self) -> Rates | None:
        """Speeds by which routes are chosen on a GPU, measured when first asked for; else None."""
        head = self.nll.head.weight
        if self._rates is None and head.device.type == "cuda":
            mlps = self.layout.decoder.mlp.values()
            channels = max((block.num_channels for block in mlps), default=head.shape[1])
            self.rates = rates_of(head.detach(), channels, self.nll.logit_rows)
        return self._rates

    @rates.setter
    def rates(self, rates: Rates) -> None:
        self._rates = rates
        self.nll.without_logits = without_logits(rates)

    def record_rates(self, path: Path, *, write: bool) -> None:
        """See `MaskScorer.record_rates`."""
        if path.is_file():
            self.rates = Rates.read(json.loads(path.read_text()))
        elif write and self.rates is not None:
            write_json(path, asdict(self.rates))

    @torch.inference_mode()
    def score(
        self,
        keep: Tensor,
        input_ids: Tensor,
        measure: Measure,
        *,
        route: Route | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """See `Engine.score`."""
        if has_foreign_hooks(self.nll.backbone):
            return self._hooks.score(keep, input_ids, measure, progress=progress)
        structure, keep = self._structure(), keep.cpu()
        route = route or self.route_for(keep, *input_ids.shape)
        schedule = self._schedule(input_ids.shape[1])
        tree = MaskTree(self.layout, structure.blocks, keep)
        positions = Positions(structure, input_ids.shape[1])
        workspace = Workspace(self.nll.head.weight)
        waves = list(_waves(tree.num_leaves, len(input_ids), schedule.wave_rows))
        if schedule.packs:
            packs = packs_of(tree, structure, route, tokens=input_ids.numel(), waves=len(waves))
            tree = PackedTree(tree, packs)
            sublayers = PackedSublayers(
                structure.sublayers, packs, workspace, contiguous=self.kernels
            )
            structure = replace(structure, sublayers=sublayers)
        found = torch.empty(tree.num_leaves, len(input_ids))
        report = _Report(progress, keep.shape[0] * len(input_ids), found.numel())
        for leaves, sequences in waves:
            tokens = input_ids[sequences].to(self.nll.head.weight.device)
            wave = Wave(
                structure, tree, leaves.start, leaves.stop, positions, schedule.chunk_rows,
                route if schedule.slices else "dense", workspace, self.kernels,
                self._multiply,
            )  # fmt: skip
            pairs = (leaves.stop - leaves.start) * len(tokens)
            states = wave.embed(tokens)
            for depth in range(len(structure.sublayers)):
                wave.step(depth, states)
                report(pairs / (len(structure.sublayers) + 1))
            found[leaves, sequences] = _measured(measure, wave, states, tokens, sequences.start)
            report(pairs / (len(structure.sublayers) + 1))
        report.finish()
        return found[tree.leaf_of_submodel]

    @torch.inference_mode()
    def parent_reference(self, input_ids: Tensor) -> ParentReference:
        """See `Engine.parent_reference`."""
        if has_foreign_hooks(self.nll.backbone):
            return self._hooks.parent_reference(input_ids)
        structure = self._structure()
        schedule = self._schedule(input_ids.shape[1])
        positions = Positions(structure, input_ids.shape[1])
        workspace = Workspace(self.nll.head.weight)
        tree = MaskTree(
            self.layout, structure.blocks, torch.ones(1, len(self.layout), dtype=torch.bool)
        )
        parts = []
        for rows in input_ids.split(min(schedule.wave_rows, schedule.chunk_rows)):
            wave = Wave(
                structure, tree, 0, 1, positions, schedule.chunk_rows, "dense", workspace,
                self.kernels, self._multiply,
            )  # fmt: skip
            states = wave.embed(rows.to(self.nll.head.weight.device))
            for depth in range(len(structure.sublayers)):
                wave.step(depth, states)
            hidden = normalize(structure.norm, states[0], workspace, kernels=self.kernels)
            parts.append(ParentReference.of_states(self.nll, hidden))
        return ParentReference.cat(parts)

    def route_for(self, keep: Tensor, sequences: int, length: int) -> Route:
        """See `Engine.route_for`. On a CPU "auto" stays: there each mask has its own route."""
        rates = self.rates
        if self.route != "auto" or rates is None:
            return self.route
        together = _sequences_together(len(keep), sequences, self.rows_per_batch(length))
        return cheapest(
            rates,
            kept_share=_kept_share(self.layout, keep.cpu()),
            tokens=together * length,
            element_size=self.nll.head.weight.element_size(),
            # the kernels multiply in full precision
            gathers=not self._low
            and all(
                gathers_heads(block.head_dim) for block in self.layout.decoder.attention.values()
            ),
        )

    def _structure(self) -> Structure:
        return read_structure(self.nll.model, self.layout)

    def _schedule(self, length: int) -> Schedule:
        needs = FusedWorkingSet.of(self.layout, self.nll, length, low=self._low)
        schedule = needs.schedule(self._budget)
        if schedule is None:
            raise ValueError(
                f"memory budget: one sequence of {length} tokens needs about "
                f"{math.ceil(needs.least_budget / 2**20)} MiB beside the weights, "
                f"got a budget of {self._budget / 2**20:.0f} MiB"
            )
        return schedule


def _measured(measure: Measure, wave: Wave, states: Tensor, tokens: Tensor, first: int) -> Tensor:
    """Last states of some leaves on some sequences -> float32 [leaves, B] on the CPU."""
    rows = states.flatten(0, 1)
    sequence = torch.arange(len(rows)) % len(tokens)
    found = []
    for chunk, which in zip(
        rows.split(wave.chunk_rows), sequence.split(wave.chunk_rows), strict=True
    ):
        hidden = normalize(wave.structure.norm, chunk, wave.workspace, kernels=wave.kernels)
        found.append(measure(hidden, tokens[which.to(tokens.device)], first + which).cpu())
    return torch.cat(found).view(states.shape[:2])


def _kept_share(layout: Layout, keep: Tensor) -> float:
    """Of the weights of sub-layers that are masked, but not gone: how much is kept, on average."""
    kept = total = 0.0
    for block, parts in layout.keep_by_block(keep):
        share = parts.sum(dim=1) / parts.shape[1]
        share = share[(share > 0) & (share < 1)]
        # rows of the projections beside each other: gate, up and down, or q and o
        size = (3 if isinstance(block, MLPBlock) else 2) * parts.shape[1] * block.part_width
        kept += size * float(share.sum())
        total += size * len(share)
    return kept / total if total else 1.0


def _sequences_together(leaves: int, sequences: int, rows: int) -> int:
    """Sequences of a wave of at most so many rows."""
    return min(sequences, max(1, rows // min(leaves, MIN_LEAVES)))


def _waves(leaves: int, sequences: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of leaves and of sequences, at most `rows` pairs each.

    Sequences are split first: sub-models share what they have in common on every sequence alike.
    """
    some = _sequences_together(leaves, sequences, rows)
    many = max(1, rows // some)
    for first in range(0, sequences, some):
        for start in range(0, leaves, many):
            yield (
                slice(start, min(start + many, leaves)),
                slice(first, min(first + some, sequences)),
            )


class _Report:
    """Turns steps of distinct pairs into whole pairs for a progress bar."""

    def __init__(self, progress: Progress | None, total: int, distinct: int) -> None:
        self._progress, self._total, self._distinct = progress, total, distinct
        self._done, self._told = 0.0, 0

    def __call__(self, pairs: float) -> None:
        self._done += pairs
        self._tell(int(self._done / self._distinct * self._total))

    def finish(self) -> None:
        self._tell(self._total)

    def _tell(self, count: int) -> None:
        if self._progress is not None and count > self._told:
            self._progress(min(count, self._total) - self._told)
        self._told = min(max(self._told, count), self._total)
