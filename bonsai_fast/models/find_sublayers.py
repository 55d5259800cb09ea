"""The sub-layers of one decoder layer and the norms that go with each, found by running the layer.

A sub-layer ends in an *output projection*: a matrix whose result reaches the layer's output through
no other matrix. All that its input was computed from belongs to the sub-layer, as far as it is not
the residual stream.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bonsai_fast.models.graph_walk import Origins, origins
from bonsai_fast.models.layer_runs import TOKENS, LayerRun
from bonsai_fast.models.readers import depends
from bonsai_fast.models.stand_in import StandIn, StandInMatrix

# Tokens that read earlier ones, also where a window or a chunk is short.
LATER_TOKENS = (1, TOKENS - 1)


@dataclass(frozen=True, eq=False)
class SubLayerFound:
    """One sub-layer; paths are inside the decoder.

    Attributes:
        output: path of the output projection.
        module: path of the smallest module that holds all of its matrices; the layer's own path if
            they are its children.
        matrices: paths of its matrices, the output projection last.
        mixes_tokens: whether it reads other positions than its own, perhaps by another layer's K.
        has_softmax: whether a softmax is taken on the way to its output projection.
        norms: paths of the norms that only it uses.
        obstacle: why it cannot be removed as a whole, or None.
    """

    output: str
    module: str
    matrices: tuple[str, ...]
    mixes_tokens: bool
    has_softmax: bool
    norms: tuple[str, ...]
    obstacle: str | None


@dataclass(frozen=True, eq=False)
class Traced:
    """The tensors of one run of a layer.

    Attributes:
        result: the layer's output.
        calls: input and output of each matrix's last call, by its path.
        passed: input and output of each other childless module's last call.
        takers: id of a tensor -> paths of the modules that were called with it.
        returns: length of the tuple that each module returned, negative for a list; None: a tensor.
    """

    result: Tensor
    calls: dict[str, tuple[Tensor, Tensor]]
    passed: dict[str, tuple[Tensor, Tensor]]
    takers: dict[int, set[str]]
    returns: dict[str, int | None]


class LayerTracer:
    """Runs one layer of a stand-in in different ways."""

    def __init__(self, stand_in: StandIn, run: LayerRun) -> None:
        self.stand_in, self.run = stand_in, run
        prefix = f"{run.path}."
        self.matrices: dict[str, StandInMatrix] = {
            path: matrix for path, matrix in stand_in.matrices.items() if path.startswith(prefix)
        }
        self.tensors: dict[str, Tensor] = {
            name: tensor
            for name, tensor in [
                *_named(run.layer.named_parameters(), prefix),
                *_named(run.layer.named_buffers(), prefix),
            ]
            if tensor.is_floating_point()
        }
        for tensor in self.tensors.values():
            tensor.requires_grad_()  # buffers too
        assert run.output is not None
        met = origins(run.output, through_matrices=False)
        self.outputs: tuple[str, ...] = tuple(path for path in met.marks if path in self.matrices)

    @cached_property
    def base(self) -> Traced:
        """A run in which nothing is traced through output projections."""
        return self.trace()

    @cached_property
    def residual(self) -> set[int]:
        """Ids of what reaches the layer's output beside its output projections."""
        return origins(self.base.result, through_matrices=True).leaves

    @cached_property
    def reads(self) -> dict[str, Origins]:
        """What the input of each output projection was computed from."""
        return {
            path: origins(self.base.calls[path][0], through_matrices=True) for path in self.outputs
        }

    def trace(
        self, *, ended: bool = True, alone: bool = False, silent: frozenset[str] = frozenset()
    ) -> Traced:
        """Run the layer.

        Args:
            ended: trace nothing through output projections.
            alone: trace nothing from a matrix's output to its input.
            silent: paths of output projections whose inputs are taken as zero.
        """
        switches = self.stand_in.switches
        switches.ended = frozenset(self.outputs) if ended else frozenset()
        switches.alone, switches.silent = alone, silent
        for matrix in self.matrices.values():
            matrix.calls.clear()
        passed: dict[str, tuple[Tensor, Tensor]] = {}
        taken: list[tuple[str, Tensor]] = []
        returns: dict[str, int | None] = {}
        try:
            with self._recorded(passed, taken, returns):
                result = self.run.again()
        finally:
            switches.ended, switches.alone, switches.silent = frozenset(), False, frozenset()
        calls = {path: m.calls[-1] for path, m in self.matrices.items() if m.calls}
        takers: dict[int, set[str]] = {}
        alive = {id(result) for _, result in passed.values()}
        for path, tensor in taken:
            if id(tensor) in alive:
                takers.setdefault(id(tensor), set()).add(path)
        return Traced(result, calls, passed, takers, returns)

    @contextmanager
    def _recorded(
        self,
        passed: dict[str, tuple[Tensor, Tensor]],
        taken: list[tuple[str, Tensor]],
        returns: dict[str, int | None],
    ) -> Iterator[None]:
        def take(path: str):  # type: ignore[no-untyped-def]
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given = (*args, *kwargs.values())
                taken.extend((path, value) for value in given if isinstance(value, Tensor))

            return before

        def record(path: str):  # type: ignore[no-untyped-def]
            def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
                returns[path] = _num_returned(result)
                if path in self.matrices or any(module.children()):
                    return
                if args and isinstance(args[0], Tensor) and isinstance(result, Tensor):
                    passed[path] = (args[0], result)

            return after

        with ExitStack() as hooks:
            for name, module in self.run.layer.named_modules():
                if not name:
                    continue
                path = f"{self.run.path}.{name}"
                hooks.callback(
                    module.register_forward_pre_hook(take(path), with_kwargs=True).remove
                )
                hooks.callback(module.register_forward_hook(record(path)).remove)
            yield


def find_sublayers(tracer: LayerTracer) -> list[SubLayerFound]:
    """All sub-layers of a layer whose output projections are as wide as the residual stream."""
    width = tracer.run.states.shape[-1]
    ends = [path for path in tracer.outputs if tracer.matrices[path].out_features == width]
    return [_sublayer(tracer, path) for path in ends]


def _sublayer(tracer: LayerTracer, output: str) -> SubLayerFound:
    own = tracer.reads[output]
    # a norm before the sub-layer may have matrices, too
    nearest = origins(tracer.base.calls[output][0], through_matrices=False).marks
    near = [path for path in nearest if path in tracer.matrices]  # others are before the layer
    module = os.path.commonpath([path.replace(".", "/") for path in (*near, output)])
    module = module.replace("/", ".")
    if module == output:
        module = output.rpartition(".")[0]
    inside = (path for path in tracer.matrices if path.startswith(f"{module}."))
    matrices = (*(path for path in inside if path in own.marks), output)
    has_softmax = any("softmax" in n.lower() or "ScaledDot" in n for n in own.operations)
    obstacle = None
    if module != tracer.run.path:
        elsewhere = _read_elsewhere(tracer, frozenset({output}))
        held = [t for name, t in tracer.tensors.items() if name.startswith(f"{module}.")]
        if any(path != output and path.startswith(f"{module}.") for path in tracer.outputs):
            obstacle = f"{_last(module)} holds more than one sub-layer"
        elif any(id(tensor) in elsewhere for tensor in held):
            obstacle = f"{_last(module)} adds to the hidden states beside its output projection"
    return SubLayerFound(
        output,
        module,
        matrices,
        has_softmax or _reads_other_tokens(tracer.base.calls[output][0], tracer.run.states),
        has_softmax,
        exclusive_norms(tracer, matrices, module),
        obstacle,
    )


def exclusive_norms(tracer: LayerTracer, matrices: Sequence[str], module: str) -> tuple[str, ...]:
    """Norms that are removed with a sub-layer: nothing else reads them, or they get only zeros.

    Args:
        matrices: paths of all its matrices.
        module: path of the module that holds them; norms inside of it are not listed.
    """
    outputs = frozenset(path for path in matrices if path in tracer.outputs)
    own = set[int]().union(*(tracer.reads[path].leaves for path in outputs))
    exclusive = own - _read_elsewhere(tracer, outputs)
    silent = tracer.trace(ended=False, silent=outputs)
    at_layer = module == tracer.run.path
    found = []
    for path, (given, result) in tracer.base.passed.items():
        held = {id(t) for name, t in tracer.tensors.items() if name.startswith(f"{path}.")}
        if not held or given.shape != result.shape:
            continue
        if not at_layer and path.startswith(f"{module}."):
            continue
        unread = held <= exclusive and all(
            taker in matrices
            or (not at_layer and f"{taker}.".startswith(f"{module}."))
            or module.startswith(f"{taker}.")
            for taker in tracer.base.takers.get(id(result), ())
        )
        if unread or (path in silent.passed and not bool(silent.passed[path][1].any())):
            found.append(path)
    return tuple(found)


def _read_elsewhere(tracer: LayerTracer, outputs: frozenset[str]) -> set[int]:
    """Ids of what reaches the layer's output by another way than these output projections."""
    others = (found.leaves for path, found in tracer.reads.items() if path not in outputs)
    return tracer.residual.union(*others)


def rows_of_token(tensor: Tensor, token: int) -> Tensor:
    """[..., C] of all tokens -> [N, C] of one token, where tokens are not in another order."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    per_token = len(rows) // TOKENS
    return rows[token * per_token : (token + 1) * per_token]


def _reads_other_tokens(given: Tensor, states: Tensor) -> bool:
    if not given.requires_grad:
        return False
    every = torch.ones(given.shape[-1], dtype=torch.bool)
    return any(
        bool(depends(rows_of_token(given, token), every, [states])[0][:, :token].any())
        for token in LATER_TOKENS
    )


def _named(named: Iterator[tuple[str, Tensor]], prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((prefix + name, tensor) for name, tensor in named)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _num_returned(result: Any) -> int | None:
    if isinstance(result, list):
        return -len(result)
    return len(result) if isinstance(result, tuple) else None
