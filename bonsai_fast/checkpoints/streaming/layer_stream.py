"""The layers of a model, two of which are in memory: the current one and the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bonsai_fast.checkpoints.streaming.packing import Packing
from bonsai_fast.checkpoints.streaming.slots import Slot, make_slots
from bonsai_fast.checkpoints.streaming.sources import LayerSource

NUM_SLOTS = 2
# number of a layer -> other weights by their names in the model, on any device; None: its own
LayerWeights = Callable[[int], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class Origin:
    """A saved model: its directory, and whether code that it carries may run."""

    directory: Path
    trust_remote_code: bool


@dataclass(eq=False)
class _Place:
    """A slot, the layer that is in it or being read into it, and parameters by layer."""

    slot: Slot
    layer: int | None = None
    job: Future[None] | None = None
    parameters: dict[int, dict[str, nn.Parameter]] = field(default_factory=dict)


class LayerStream:
    """Brings the weights of a model's layers into memory, one layer after another.

    All other layers have their parameters on the meta device. Running a layer brings it in, and so
    does `bring_in`; the next one is then read in the background (after the last one, the first).
    Use a model from one thread at a time.

    Args:
        path: of the layers in the model.
        layers: the modules; their parameters are on the meta device.
        source: where their weights are read from.
        device: where they are computed.
        origin: the directory that they are read from; None if they are in the host's memory.
    """

    def __init__(
        self,
        path: str,
        layers: Sequence[nn.Module],
        source: LayerSource,
        device: torch.device,
        origin: Origin | None,
    ) -> None:
        self.path, self.device, self.origin = path, device, origin
        self._layers, self._source = list(layers), source
        self._packings = [Packing.of(layer_tensors(layer)) for layer in self._layers]
        self._absent = [dict(layer.named_parameters()) for layer in self._layers]
        largest = max((packing.num_bytes for packing in self._packings), default=0)
        slots = make_slots(NUM_SLOTS, largest, device, staged=source.needs_room)
        self._places = [_Place(slot) for slot in slots]
        self._current: _Place | None = None
        self._exchanged: list[LayerWeights] = []
        self._is_paused = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="layer-stream")
        for index, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(self._hook(index))

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_bytes(self) -> int:
        """Size of the weights of all layers."""
        return sum(packing.num_bytes for packing in self._packings)

    @property
    def resident_bytes(self) -> int:
        """Size of the memory that layers are read into."""
        return NUM_SLOTS * max((packing.num_bytes for packing in self._packings), default=0)

    def bring_in(self, index: int) -> None:
        """Have the parameters of a layer in place, until another one is brought in.

        Raises:
            OSError: its files cannot be read.
        """
        if self._current is not None and self._current.layer == index:
            return
        place = next((place for place in self._places if place.layer == index), None)
        if place is None:
            place = next(place for place in self._places if place is not self._current)
            self._fetch(place, index)
        assert place.job is not None
        try:
            place.job.result()
        except BaseException:
            place.layer = None  # it may hold parts of two layers
            raise
        place.slot.wait()
        self._take_out()
        _put(self._layers[index], self._parameters(place, index) | self._others(index))
        self._current = place
        following = (index + 1) % self.num_layers
        other = next(other for other in self._places if other is not place)
        if other.layer != following and following != index:
            self._fetch(other, following)

    @contextmanager
    def exchanged(self, weights: LayerWeights) -> Iterator[None]:
        """Inside, layers have other weights; whoever brings a layer in, finds them there.

        Args:
            weights: called whenever a layer is brought in.
        """
        self._take_out()
        self._exchanged.append(weights)
        try:
            yield
        finally:
            self._exchanged.pop()
            self._take_out()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, running a layer does not bring it in: for calls that skip its weights."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def _take_out(self) -> None:
        """Leave no layer with weights; what slots hold can be used again."""
        if self._current is not None and self._current.layer is not None:
            _put(self._layers[self._current.layer], self._absent[self._current.layer])
        self._current = None

    def _fetch(self, place: _Place, index: int) -> None:
        place.slot.release()
        place.layer = index
        packing = self._packings[index]

        def read(room: Tensor | None) -> Tensor:
            return self._source.read(index, packing, room)

        place.job = self._worker.submit(place.slot.fill, read)

    def _parameters(self, place: _Place, index: int) -> dict[str, nn.Parameter]:
        if index not in place.parameters:
            # the first caller may be in inference mode, later ones not
            with torch.inference_mode(False):
                views = self._packings[index].views(place.slot.flat)
                place.parameters[index] = {
                    name: nn.Parameter(view, requires_grad=False) for name, view in views.items()
                }
        return place.parameters[index]

    def _others(self, index: int) -> dict[str, nn.Parameter]:
        """What a layer has in place of its own weights."""
        prefix = f"{self.path}.{index}."
        with torch.inference_mode(False):
            return {
                name.removeprefix(prefix): nn.Parameter(tensor.to(self.device), requires_grad=False)
                for weights in self._exchanged
                for name, tensor in (weights(index) or {}).items()
            }

    def _hook(self, index: int):  # type: ignore[no-untyped-def]
        def bring_in(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not self._is_paused:
                self.bring_in(index)

        # it calls `bring_in` itself
        bring_in.fused_engine_may_skip = True  # type: ignore[attr-defined]
        return bring_in


def layer_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors of a layer that are streamed, by name: its parameters."""
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def _put(layer: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        module, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(module), attribute, parameter)
