"""Zero-shot tasks by lm-evaluation-harness."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_tasks(tasks: list[str]) -> None:
    """Raise ValueError unless lm-evaluation-harness is installed and knows these tasks.

    Args:
        tasks: names of tasks, groups or tags, or paths of YAML files.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks need lm-evaluation-harness: pip install lm-eval")
    known = importlib.import_module("lm_eval.tasks").TaskManager().all_tasks
    unknown = [task for task in tasks if task not in known and not Path(task).is_file()]
    if unknown:
        raise ValueError(f"tasks: lm-evaluation-harness does not know {', '.join(unknown)}")


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    *,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-evaluation-harness on a model in memory.

    Args:
        model, tokenizer: the model to evaluate.
        tasks: as for `check_tasks`.
        limit: number of examples of each task; all if None.
    Returns:
        metric values by task and metric name.
    Raises:
        ValueError: the harness is not installed or does not know a task.
    """
    check_tasks(tasks)
    harness: Any = importlib.import_module("lm_eval")
    wrapper: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    found = harness.simple_evaluate(
        model=wrapper(pretrained=model, tokenizer=tokenizer), tasks=tasks, limit=limit
    )
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found["results"].items()
    }
