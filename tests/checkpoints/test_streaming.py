"""A model whose layers are streamed computes what the loaded one does, with little in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from surgery_cases import MASKS, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

import bonsai_fast as bf
from bonsai_fast.checkpoints.streaming import (
    bring_in_layer,
    exchanged_weights,
    named_weights,
    stream_of,
    weight,
)
from bonsai_fast.checkpoints.streaming.slots import CpuSlot, CudaSlot
from bonsai_fast.methods.importance.prior import unit_prior
from bonsai_fast.methods.importance.statistics import collect_statistics
from bonsai_fast.models.layout import Layout
from bonsai_fast.runs.identity import fingerprint
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.surgery import remove_units, save_pretrained

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def masks(layout: Layout, count: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, len(layout), generator=generator) < 0.7


def saved(directory: Path, family: str, dtype: torch.dtype, **options: object) -> PreTrainedModel:
    """A tiny model on disk, and what loading it gives."""
    FAMILIES[family]().to(dtype).save_pretrained(directory, **options)
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


@pytest.fixture
def llama3(tmp_path: Path) -> PreTrainedModel:
    return saved(tmp_path, "llama3", torch.float32)


def assert_same(model: PreTrainedModel, streamed: PreTrainedModel) -> None:
    """Logits, losses, divergences, statistics and priors, to the bit."""
    with torch.no_grad():
        assert torch.equal(streamed(tokens()).logits, model(tokens()).logits)
    scorers = [MaskScorer(each) for each in (model, streamed)]
    assert scorers[0].engine.name == scorers[1].engine.name
    keep = masks(scorers[0].layout)
    expected, found = (scorer.score(keep, tokens(3)) for scorer in scorers)
    assert torch.equal(found, expected) and expected.std() > 0
    expected, found = (
        unit_prior("wanda", each.model, each.layout, collect_statistics(each, keep[0], tokens()))
        for each in scorers
    )
    assert torch.equal(found, expected)
    expected, found = (scorer.divergence(keep, tokens()) for scorer in scorers)
    assert torch.equal(found, expected)
    assert fingerprint(streamed) == fingerprint(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_loaded_model(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path, family, torch.float32)
    assert_same(model, bf.open_streamed(tmp_path))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("family", ["llama3", "qwen2", "gemma", "opt"])
def test_equals_it_in_low_precision(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved(tmp_path, family, dtype)
    streamed = bf.open_streamed(tmp_path)
    assert streamed.dtype == dtype
    assert_same(model, streamed)


def test_shards(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama_bias", torch.float32, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(model, bf.open_streamed(tmp_path))


def test_computes_in_another_dtype_than_the_files(tmp_path: Path) -> None:
    saved(tmp_path, "llama3", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert_same(model, bf.open_streamed(tmp_path, dtype=torch.bfloat16))


def test_a_model_that_was_pruned_before(tmp_path: Path) -> None:
    """Layers of different widths, some without an attention or an MLP."""
    parent = FAMILIES["llama3"]()
    for name in ("half", "first attention gone"):
        layout = Layout.of(parent)
        save_pretrained(remove_units(parent, layout, MASKS[name](layout)), tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").eval()
        assert_same(model, bf.open_streamed(tmp_path / name))


@pytest.mark.parametrize("family", ["llama3", "phi3", "bloom"])
def test_layers_in_host_memory(family: str) -> None:
    model = FAMILIES[family]()
    streamed = bf.stream_layers(FAMILIES[family](), device="cpu")
    assert all(p.is_meta for p in streamed.get_submodule(stream_of(streamed).path).parameters())
    assert_same(model, streamed)


def test_ties_stay_ties(llama3: PreTrainedModel, tmp_path: Path) -> None:
    streamed = bf.open_streamed(tmp_path)
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight
    assert len(list(streamed.parameters())) == len(list(llama3.parameters()))


def test_two_layers_are_there_at_most(llama3: PreTrainedModel, tmp_path: Path) -> None:
    """One at work and one on its way, however often the model has run."""
    streamed = bf.open_streamed(tmp_path)
    stream = stream_of(streamed)
    scorer = MaskScorer(streamed)
    scorer.score(masks(scorer.layout), tokens())
    there = [
        any(not parameter.is_meta for parameter in layer.parameters())
        for layer in streamed.model.layers
    ]
    assert sum(there) == 1 and len(stream._places) == 2
    sizes = [p.numel() * 4 for p in llama3.model.layers[0].parameters()]
    assert 2 * sum(sizes) <= stream.resident_bytes <= 2 * (sum(sizes) + 256 * len(sizes))
    assert stream.num_bytes * 2 == stream.resident_bytes * 3


def test_a_pass_reads_each_layer_once(
    llama3: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = bf.open_streamed(tmp_path)
    scorer = MaskScorer(streamed)
    source = stream_of(streamed)._source
    bring_in_layer(streamed, 2)
    stream_of(streamed)._places[0].job.result()
    stream_of(streamed)._places[1].job.result()  # layer 0 is on its way
    seen: list[int] = []
    read = source.read
    monkeypatch.setattr(
        source, "read", lambda layer, *rest: (seen.append(layer), read(layer, *rest))[1]
    )
    scorer.score(masks(scorer.layout, 40), tokens())
    stream_of(streamed)._worker.submit(int).result()
    assert seen == [1, 2, 0]


def test_any_order_will_do(llama3: PreTrainedModel, tmp_path: Path) -> None:
    streamed = bf.open_streamed(tmp_path)
    for index in (2, 0, 1, 1, 0, 2, 1, 0, 0, 2):
        name = f"model.layers.{index}.mlp.up_proj.weight"
        assert torch.equal(weight(streamed, name), llama3.get_parameter(name))
    expected = dict(llama3.named_parameters())
    assert all(torch.equal(found, expected.pop(name)) for name, found in named_weights(streamed))
    assert not expected


UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def test_other_weights_in_the_place_of_a_layers_own(
    llama3: PreTrainedModel, tmp_path: Path
) -> None:
    """In memory and streamed; a layer that is there already gets them, and its own back."""
    streamed, own = bf.open_streamed(tmp_path), llama3.get_parameter(UP_PROJ).detach().clone()
    zeros = {1: {UP_PROJ: torch.zeros_like(own)}}
    with torch.no_grad():
        dense = llama3(tokens()).logits
    found = []
    for model in (llama3, streamed):
        bring_in_layer(model, 1)
        with pytest.raises(RuntimeError, match="stop"), exchanged_weights(model, zeros.get):
            assert not weight(model, UP_PROJ).any()
            bring_in_layer(model, 2)
            with torch.inference_mode():
                found.append(model(tokens()).logits)
            assert not weight(model, UP_PROJ).any()
            raise RuntimeError("stop")
        assert torch.equal(weight(model, UP_PROJ), own)
        with torch.no_grad():
            assert torch.equal(model(tokens()).logits, dense)
    assert torch.equal(*found) and not torch.equal(found[0], dense)


@pytest.mark.gpu
def test_exchanged_weights_take_no_room_beside_the_models_own(llama3: PreTrainedModel) -> None:
    model = llama3.cuda()
    own = model.get_parameter(UP_PROJ).detach().cpu()
    before = torch.cuda.memory_allocated()
    with exchanged_weights(model, {1: {UP_PROJ: torch.zeros_like(own)}}.get):
        assert torch.cuda.memory_allocated() == before
        assert model.get_parameter(UP_PROJ).is_cuda and not model.get_parameter(UP_PROJ).any()
    assert torch.equal(model.get_parameter(UP_PROJ).cpu(), own)


def test_exchanged_layers_that_cannot_be_read_leave_no_layer(
    llama3: PreTrainedModel, tmp_path: Path
) -> None:
    """Or the next to ask for it would get the layer's own weights."""
    streamed = bf.open_streamed(tmp_path)

    def broken(number: int) -> None:
        raise OSError(f"layer {number} is gone")

    with exchanged_weights(streamed, broken):
        for _ in range(2):
            with pytest.raises(OSError, match="layer 1 is gone"):
                bring_in_layer(streamed, 1)
    assert torch.equal(weight(streamed, UP_PROJ), llama3.get_parameter(UP_PROJ))


def test_a_paused_stream_brings_nothing_in(llama3: PreTrainedModel, tmp_path: Path) -> None:
    streamed = bf.open_streamed(tmp_path)
    layer = streamed.model.layers[1]
    layer.forward = lambda states: states
    with stream_of(streamed).paused():
        layer(torch.zeros(1))
    assert layer.mlp.up_proj.weight.is_meta
    layer(torch.zeros(1))
    assert not layer.mlp.up_proj.weight.is_meta


def test_a_slot_is_not_refilled_while_its_layer_is_at_work(
    llama3: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is at work keeps its values although the next layer has long arrived."""
    streamed = bf.open_streamed(tmp_path)
    for index in (0, 1, 2, 0):
        bring_in_layer(streamed, index)
        stream_of(streamed)._worker.submit(int).result()
        name = f"model.layers.{index}.mlp.down_proj.weight"
        assert torch.equal(streamed.get_parameter(name), llama3.get_parameter(name))


def test_slots_are_used_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Released before it is filled, filled before it is waited for: what streams rely on."""
    saved(tmp_path, "llama3", torch.float32)
    events: list[tuple[str, int]] = []

    def record(action: str) -> None:
        inner = getattr(CpuSlot, action)

        def recorded(self, *arguments):
            events.append((action, id(self)))
            return inner(self, *arguments)

        monkeypatch.setattr(CpuSlot, action, recorded)

    for action in ("release", "fill", "wait"):
        record(action)
    streamed = bf.open_streamed(tmp_path)
    for _ in range(2):
        streamed(tokens())
    stream_of(streamed)._worker.submit(int).result()
    for slot in {slot for _, slot in events}:
        mine = [action for action, which in events if which == slot]
        assert mine[: len(mine) // 3 * 3] == ["release", "fill", "wait"] * (len(mine) // 3)
        assert len(mine) >= 8


class FakeCuda:
    """CUDA's streams and events on a CPU: who waited for what, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def event(self, name: str):
        log = self.log

        class Event:
            def record(self, stream: object) -> None:
                log.append(f"{stream} records {name}")

            def synchronize(self) -> None:
                log.append(f"host waits for {name}")

        event = Event()
        event.name = name
        return event

    def stream(self, name: str):
        log = self.log

        class Stream:
            def wait_event(self, event) -> None:
                log.append(f"{name} waits for {event.name}")

            def __str__(self) -> str:
                return name

        return Stream()


@pytest.mark.parametrize("staged", [True, False])
def test_a_cuda_slot_keeps_reading_and_writing_apart(
    staged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda()
    names = iter(["released", "filled"])
    side, main = fake.stream("copies"), fake.stream("computation")
    monkeypatch.setattr(torch.cuda, "Event", lambda: fake.event(next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.no_grad())
    monkeypatch.setattr(
        "bonsai_fast.checkpoints.streaming.slots.host_buffer", lambda size, **_: room[:size]
    )
    room = torch.zeros(8, dtype=torch.uint8)
    slot = CudaSlot(8, torch.device("cpu"), side, staged=staged)
    there = torch.arange(1, 6, dtype=torch.uint8)

    def read(given: torch.Tensor | None) -> torch.Tensor:
        fake.log.append("read")
        assert (given is not None) == staged
        return there

    slot.release()
    slot.fill(read)
    slot.wait()
    assert slot.flat[:5].tolist() == [1, 2, 3, 4, 5]
    wanted = [
        "computation records released",
        "host waits for filled",
        "read",
        "copies waits for released",
        "copies records filled",
        "computation waits for filled",
    ]
    assert fake.log == [entry for entry in wanted if staged or not entry.startswith("host")]


def test_what_cannot_be_read_is_an_error_and_may_be_tried_again(
    llama3: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = bf.open_streamed(tmp_path)
    source = stream_of(streamed)._source

    def broken(*_: object) -> torch.Tensor:
        raise OSError("the disk is gone")

    monkeypatch.setattr(source, "read", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        bring_in_layer(streamed, 1)
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(streamed(tokens()).logits, llama3(tokens()).logits)


def test_bad_directories_are_refused_in_one_line(llama3: PreTrainedModel, tmp_path: Path) -> None:
    cases = {
        tmp_path / "nowhere": "expected the directory of a saved model",
        tmp_path / "empty": "expected model.safetensors",
    }
    (tmp_path / "empty").mkdir()
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        directory = tmp_path / name
        llama3.save_pretrained(directory)
        left = {key: value for key, value in tensors.items() if key != name}
        save_file(left, directory / "model.safetensors", metadata={"format": "pt"})
        cases[directory] = f"expected a tensor {name}, found none"
    for directory, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            bf.open_streamed(directory)
        assert "\n" not in str(caught.value)


def test_other_misuse_is_refused(llama3: PreTrainedModel, tmp_path: Path) -> None:
    streamed = bf.open_streamed(tmp_path)
    layout = Layout.of(streamed)
    with pytest.raises(ValueError, match="neither offloaded nor streamed"):
        remove_units(streamed, layout, torch.ones(len(layout), dtype=torch.bool))
    with pytest.raises(ValueError, match="streamed already"):
        bf.stream_layers(streamed)
    with pytest.raises(ValueError, match="expected a model on the CPU"):
        bf.stream_layers(FAMILIES["llama"]().to("meta"))


def test_the_budget_decides_how_much_goes_together(llama3: PreTrainedModel, tmp_path: Path) -> None:
    """A loaded model's batches stop growing where they are fast; a streamed one's do not."""
    for engine in ("fused", "hooks"):
        loaded, streamed, small = (
            MaskScorer(model, engine=engine, memory_budget=budget)
            .session(tokens(4, 64))
            .submodels_per_chunk
            for model, budget in (
                (llama3, "1GiB"),
                (bf.open_streamed(tmp_path), "1GiB"),
                (bf.open_streamed(tmp_path), "8MiB"),
            )
        )
        assert streamed > 16 >= loaded
        assert small < streamed / 20
