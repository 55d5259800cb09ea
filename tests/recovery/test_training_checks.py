"""What is refused before any work, in one line."""

import importlib.util
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_llama
from training_cases import LENGTH, parent, pruned, text_of, tiny_task, tiny_text

import bonsai_fast as bf
from bonsai_fast.evaluation.text import Sequences
from bonsai_fast.methods import configure
from bonsai_fast.recovery.distill import DistillTier


def no_text(sequences: int = 0, length: int = LENGTH) -> Sequences:
    return Sequences(torch.zeros(sequences, length, dtype=torch.int64), "short.txt", "none")


def quantised(model):
    model.config.quantization_config = {"quant_method": "fp8"}
    return model


def of_another_hidden_size(**changes):
    return tiny_llama(hidden_size=54, **changes)


CASES = {
    "streamed": ({"student": lambda: bf.stream_layers(parent())}, "whole pruned model in memory"),
    "quantised parent": ({"teacher": lambda: quantised(parent())}, "the parent is quantised"),
    "quantised": ({"student": lambda: quantised(parent())}, "the pruned model is quantised"),
    "vocabulary": (
        {"teacher": lambda: tiny_llama(vocab_size=300)},
        "vocabulary of 258 tokens and its parent one of 300",
    ),
    "no text": ({"text": no_text}, "text of at least one sequence .*'short.txt' is too short"),
    "no held-out text": ({"held_out": no_text}, "held-out text of at least one sequence"),
    "one token": ({"text": lambda: no_text(3, 1)}, "of 2 tokens, got 3 of 1"),
    "foreign tokens": (
        {"text": lambda: text_of(tiny_llama(vocab_size=2000), 2, seed=0)},
        "expected the model's own tokenizer",
    ),
    "few tokens": (
        {"options": lambda: {"recover_tokens": 5}},
        "recover_tokens: expected at least one sequence of 17 tokens, got 5",
    ),
    "hidden size": (
        {"teacher": of_another_hidden_size, "options": lambda: {"recover_hidden": 0.1}},
        "recover_hidden: expected the parent's hidden size 54, the pruned model has 48",
    ),
    "rank": (
        {"options": lambda: {"recover_rank": 4, "recover_weights": "norms"}},
        "recover_rank: recover_weights=norms trains no adapters",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(tmp_path, name):
    changes, message = CASES[name]
    task = tiny_task(tmp_path / "new", **{key: make() for key, make in changes.items()})
    with pytest.raises(ValueError, match=message) as error:
        DistillTier("distill").check(task)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"recover": "wanda-lora", "recover_rate": 0.1},
        {"recover": "mini-llm", "recover_weights": "all"},
        {"recover": "distill", "recover_kl": "paper"},
        {"recover": "policy-gradient", "recover_teacher": "live"},
    ],
)
def test_options_that_a_tier_does_not_read(options):
    with pytest.raises(ValueError, match=f"has no effect with recover={options['recover']}"):
        configure(**options)


def test_without_peft(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "peft" else find(name, *rest),
    )
    with pytest.raises(ValueError, match=r'not installed: pip install "bonsai-fast\[recover\]"'):
        DistillTier("distill").check(tiny_task(tmp_path))
    DistillTier("distill").check(tiny_task(tmp_path, options={"recover_weights": "all"}))


def test_a_full_disk(tmp_path, monkeypatch):
    task = tiny_task(tmp_path / "new", options={"recover_teacher": "cached"})
    needed = DistillTier("distill").plan(task).disk_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(ValueError, match=r"GiB on the disk, .* GiB are free; choose another"):
        DistillTier("distill").check(task)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    DistillTier("distill").check(task)


def test_another_hidden_size_does_not_matter_to_the_divergence(tmp_path):
    task = tiny_task(tmp_path, teacher=of_another_hidden_size(), student=pruned(parent()))
    DistillTier("distill").check(task)


def test_a_head_with_something_behind_it_is_refused(tmp_path):
    """Its logits would not be those that are trained."""
    task = tiny_task(tmp_path, text=tiny_text(2, seed=1))
    forward = task.teacher.forward

    def changed(*arguments, **keywords):
        output = forward(*arguments, **keywords)
        output.logits = output.logits.flip(-1)
        return output

    task.teacher.forward = changed
    with pytest.raises(ValueError, match="its logits are not its LM head applied"):
        DistillTier("distill").check(task)
