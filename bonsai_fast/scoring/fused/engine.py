"""The fused engine: runs all sub-models of a wave layer by layer, without the model's modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.config.choices import Precision, Route
from bonsai_fast.files import write_json
from bonsai_fast.models.layout import Layout
from bonsai_fast.scoring.divergence import ParentReference
from bonsai_fast.scoring.fused.arithmetic.arithmetic import Arithmetic
from bonsai_fast.scoring.fused.arithmetic.products import products
from bonsai_fast.scoring.fused.choose_route import cheapest, masked_kept_share, without_logits
from bonsai_fast.scoring.fused.foreign_hooks import has_foreign_hooks
from bonsai_fast.scoring.fused.gpu_rates import Rates, rates_of
from bonsai_fast.scoring.fused.mask_tree import MaskTree
from bonsai_fast.scoring.fused.operands.choose_packs import choose_packs
from bonsai_fast.scoring.fused.operands.gather import gathers_heads
from bonsai_fast.scoring.fused.operands.packed_sublayers import PackedSublayers
from bonsai_fast.scoring.fused.pair_progress import PairProgress
from bonsai_fast.scoring.fused.parent import Structure
from bonsai_fast.scoring.fused.positions import Positions
from bonsai_fast.scoring.fused.read_parent import read_structure
from bonsai_fast.scoring.fused.schedule import (
    FusedWorkingSet,
    Schedule,
    sequences_together,
    waves,
)
from bonsai_fast.scoring.fused.self_check import check_structure
from bonsai_fast.scoring.fused.sublayer_step import run_sublayer
from bonsai_fast.scoring.fused.wave import Wave
from bonsai_fast.scoring.hooks_engine import HooksEngine
from bonsai_fast.scoring.interface import Measure, Progress
from bonsai_fast.scoring.output_weights import SubmodelOutputs
from bonsai_fast.scoring.sequence_nll import SequenceNLL, evaluation_mode
from bonsai_fast.scoring.working_set import MAX_TOKENS, too_small

# limit for a chunk of sub-models: little work is lost when a run is interrupted
MAX_SUBMODELS_PER_CHUNK = 16


class FusedEngine:
    """Scores sub-models of parents that `read_parent` describes; shared work is done once.

    The engine reads the weights of the model's modules and does not call the modules. If there are
    foreign hooks on them, it runs the model by `HooksEngine` instead, so that the hooks run.

    Args:
        layout: the units.
        nll: the model and its loss.
        memory_budget: bytes.
        route: how sub-layers with removed parts are computed; see `MaskScorer`.
        precision: of their matrix products; see `products`.
    Attributes:
        kernels: whether the project's ops and PyTorch's fused functions are used. True on CUDA,
            where they are kernels; True elsewhere runs their plain versions.
    Raises:
        UnsupportedStructureError: something in the model is unknown; the message names it.
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
        self._parallel, self._capped = structure.parallel, structure.capped
        with evaluation_mode(nll.model):
            check_structure(nll.model, layout, structure)

    def rows_per_batch(self, length: int, *, own_outputs: bool = False) -> int:
        """Number of (sub-model, sequence) pairs whose states are held at once."""
        return self._schedule(length, own_outputs=own_outputs).wave_rows

    def submodels_per_chunk(self, sequences: int, length: int, *, own_outputs: bool = False) -> int:
        """See `Engine.submodels_per_chunk`."""
        submodels = self.rows_per_batch(length, own_outputs=own_outputs) // sequences
        if stream_of(self.nll.model) is None:  # a streamed model reads all weights for every call
            most = MAX_SUBMODELS_PER_CHUNK
            if self.kernels:  # few sub-models are too little work for a GPU
                most = max(most, MAX_TOKENS["cuda"] // (sequences * length))
            submodels = min(most, submodels)
        return max(1, submodels)

    @property
    def rates(self) -> Rates | None:
        """Speeds by which routes are chosen on a GPU, measured at their first use; else None."""
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

    def check_own_outputs(self) -> None:
        """See `Engine.check_own_outputs`."""
        if self.route == "split":
            raise ValueError("route split does not support output_weights: choose route pack")

    def route_for(self, keep: Tensor, sequences: int, length: int) -> Route:
        """See `Engine.route_for`. On a CPU "auto" stays: there each mask has its own route."""
        rates = self.rates
        if self.route != "auto" or rates is None:
            return self.route
        together = sequences_together(len(keep), sequences, self.rows_per_batch(length))
        return cheapest(
            rates,
            kept_share=masked_kept_share(self.layout, keep.cpu()),
            tokens=together * length,
            element_size=self.nll.head.weight.element_size(),
            # the gather kernels multiply in full precision
            gathers=not self._low
            and all(
                block.whole is not None or gathers_heads(block.head_dim)
                for block in self.layout.decoder.attention.values()
            ),
        )

    @torch.inference_mode()
    def score(
        self,
        keep: Tensor,
        input_ids: Tensor,
        measure: Measure,
        *,
        outputs: SubmodelOutputs | None = None,
        route: Route | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """See `Engine.score`."""
        if has_foreign_hooks(self.nll.backbone):
            return self._hooks.score(keep, input_ids, measure, outputs=outputs, progress=progress)
        structure, keep = self._structure(), keep.cpu()
        route = route or self.route_for(keep, *input_ids.shape)
        schedule = self._schedule(input_ids.shape[1], own_outputs=outputs is not None)
        tree = MaskTree(self.layout, structure.blocks, keep, outputs)
        positions = Positions(structure, input_ids.shape[1])
        arithmetic = self._arithmetic()
        parts = list(waves(tree.num_leaves, len(input_ids), schedule.wave_rows))
        if schedule.packs:
            packs = choose_packs(tree, structure, route, tokens=input_ids.numel(), waves=len(parts))
            if outputs is not None:
                # what nobody keeps has no parts, but perhaps own biases
                packs = {depth: pack for depth, pack in packs.items() if len(pack.parts)}
            tree = tree.of_parts({depth: pack.parts for depth, pack in packs.items()})
            sublayers = PackedSublayers(structure.sublayers, packs, arithmetic)
            structure = replace(structure, sublayers=sublayers)
        found = torch.empty(tree.num_leaves, len(input_ids))
        report = PairProgress(progress, keep.shape[0] * len(input_ids), found.numel())
        for leaves, sequences in parts:
            wave = Wave(
                structure=structure,
                tree=tree,
                leaves=leaves,
                positions=positions,
                chunk_rows=schedule.chunk_rows,
                route=route if schedule.slices else "dense",
                arithmetic=arithmetic,
                outputs=outputs,
                held_outputs=schedule.held_outputs,
            )
            tokens = input_ids[sequences].to(self.nll.head.weight.device)
            step = len(leaves) * len(tokens) / (len(structure.sublayers) + 1)
            states = _last_states(wave, tokens, partial(report.add, step))
            local = _measured(measure, wave, states, tokens, sequences.start)
            found[leaves.start : leaves.stop, sequences] = local
            report.add(step)
        report.finish()
        return found[tree.leaf_of_submodel]

    @torch.inference_mode()
    def parent_reference(self, input_ids: Tensor) -> ParentReference:
        """See `Engine.parent_reference`."""
        if has_foreign_hooks(self.nll.backbone):
            return self._hooks.parent_reference(input_ids)
        structure = self._structure()
        schedule = self._schedule(input_ids.shape[1])
        everything = torch.ones(1, len(self.layout), dtype=torch.bool)
        wave = Wave(
            structure=structure,
            tree=MaskTree(self.layout, structure.blocks, everything),
            leaves=range(1),
            positions=Positions(structure, input_ids.shape[1]),
            chunk_rows=schedule.chunk_rows,
            route="dense",
            arithmetic=self._arithmetic(),
        )
        parts = []
        for rows in input_ids.split(min(schedule.wave_rows, schedule.chunk_rows)):
            states = _last_states(wave, rows.to(self.nll.head.weight.device))
            hidden = wave.arithmetic.normalize(structure.norm, states[0])
            parts.append(ParentReference.of_states(self.nll, hidden))
        return ParentReference.cat(parts)

    def _arithmetic(self) -> Arithmetic:
        like = self.nll.head.weight
        return Arithmetic(like, multiply=self._multiply, kernels=self.kernels)

    def _structure(self) -> Structure:
        return read_structure(self.nll.model, self.layout)

    def _schedule(self, length: int, *, own_outputs: bool = False) -> Schedule:
        needs = FusedWorkingSet.of(
            self.layout,
            self.nll,
            length,
            low=self._low,
            own_outputs=own_outputs,
            parallel=self._parallel,
            capped=self._capped,
        )
        schedule = needs.schedule(self._budget)
        if schedule is None:
            raise too_small(self._budget, needs.least_budget, length)
        return schedule


def _last_states(
    wave: Wave, tokens: Tensor, on_sublayer: Callable[[], None] | None = None
) -> Tensor:
    """States [leaves, B, T, D] after the last sub-layer, of tokens int64 [B, T] on the device."""
    states = wave.embed(tokens)
    for depth in range(len(wave.structure.sublayers)):
        run_sublayer(wave, depth, states)
        if on_sublayer is not None:
            on_sublayer()
    return states


def _measured(measure: Measure, wave: Wave, states: Tensor, tokens: Tensor, first: int) -> Tensor:
    """Measure every pair of a wave; sequence `first` of the text is its first one.

    Returns:
        float32 [leaves, B] on the CPU.
    """
    rows = states.flatten(0, 1)
    sequences = torch.arange(len(rows)) % len(tokens)
    found = []
    for chunk, which in zip(
        rows.split(wave.chunk_rows), sequences.split(wave.chunk_rows), strict=True
    ):
        hidden = wave.arithmetic.normalize(wave.structure.norm, chunk)
        found.append(measure(hidden, tokens[which.to(tokens.device)], first + which).cpu())
    return torch.cat(found).view(states.shape[:2])
