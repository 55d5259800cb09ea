"""A script that runs prompts in transformers, without bonsai_fast.

    python run_transformers.py REQUEST.json ANSWER.json

The request holds the model's directory, prompts as token ids, and the number of likely next tokens
to return. The answer holds one list of [token id, log-probability] for each prompt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main(request_path: str, answer_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if wrong:
        raise RuntimeError(f"weights do not fit the model: {wrong}")
    answers = []
    for prompt in request["prompts"]:
        logits = model.eval()(torch.tensor([prompt])).logits[0, -1]
        likely = logits.float().log_softmax(-1).topk(request["num_likely"])
        answers.append(list(zip(likely.indices.tolist(), likely.values.tolist(), strict=True)))
    Path(answer_path).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
