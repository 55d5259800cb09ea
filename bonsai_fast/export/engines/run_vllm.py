"""A script that runs prompts in vLLM.

    python run_vllm.py REQUEST.json ANSWER.json

The request holds the model's directory, prompts as token ids, and the number of likely next tokens
to return. The answer holds one list of [token id, log-probability] for each prompt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(request_path: str, answer_path: str) -> None:
    import vllm

    request = json.loads(Path(request_path).read_text())
    engine: Any = vllm.LLM(
        model=request["model"],
        trust_remote_code=True,
        dtype="float32",
        max_model_len=request["context_length"],
        max_logprobs=request["num_likely"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        **request.get("options", {}),
    )
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=1, logprobs=request["num_likely"], detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    answers = [
        [[token, entry.logprob] for token, entry in output.outputs[0].logprobs[0].items()]
        for output in engine.generate(prompts, sampling)
    ]
    Path(answer_path).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
