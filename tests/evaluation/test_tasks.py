"""Zero-shot tasks: handed over to lm-evaluation-harness, refused early where it cannot run them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import byte_tokenizer, tiny_llama

from bonsai_fast.config import PruneConfig
from bonsai_fast.evaluation.tasks import evaluate_tasks
from bonsai_fast.prune.units import prepare

SMALL = {"num_sequences": 2, "sequence_length": 32, "evaluation_tokens": 256, "recover": "none"}

# a task of our own, so that nothing need be downloaded
TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
QUESTIONS = [
    {"question": "The capital of France is", "choices": [" Paris", " Berlin"], "answer": 0},
    {"question": "The capital of Germany is", "choices": [" Paris", " Berlin"], "answer": 1},
    {"question": "The capital of Japan is", "choices": [" Tokyo", " Lima"], "answer": 0},
]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for lm-evaluation-harness; keeps what it was asked."""
    asked = SimpleNamespace()

    def simple_evaluate(*, model: Any, tasks: list[str], limit: int | None) -> dict[str, Any]:
        asked.model, asked.tasks, asked.limit = model, tasks, limit
        return {"results": {task: {"acc,none": 0.5, "alias": task} for task in tasks}}

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": lambda: SimpleNamespace(all_tasks=["arc", "boolq"])},
        "lm_eval.models.huggingface": {"HFLM": lambda **given: given},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: SimpleNamespace())
    return asked


def test_tasks_are_handed_over_and_numbers_come_back(harness: SimpleNamespace) -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    found = evaluate_tasks(model, tokenizer, ["arc", "boolq"], limit=7)
    assert found == {"arc": {"acc,none": 0.5}, "boolq": {"acc,none": 0.5}}
    assert harness.tasks == ["arc", "boolq"] and harness.limit == 7
    assert harness.model["pretrained"] is model and harness.model["tokenizer"] is tokenizer


def test_an_unknown_task_is_refused_before_any_work(harness: SimpleNamespace) -> None:
    config = PruneConfig(tasks="arc, hellaswamp", **SMALL)
    with pytest.raises(ValueError, match="does not know hellaswamp"):
        prepare(tiny_llama(), byte_tokenizer(), config)
    prepare(tiny_llama(), byte_tokenizer(), PruneConfig(tasks="arc, boolq", **SMALL))


def test_the_real_harness_runs_a_task_file(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = tmp_path / "capitals.yaml"
    task.write_text(TASK.format(data=data))
    found = evaluate_tasks(tiny_llama(), byte_tokenizer(), [str(task)])
    (metrics,) = found.values()
    assert metrics["acc,none"] in (0.0, 1 / 3, 2 / 3, 1.0)
