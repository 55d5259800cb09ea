"""A script that runs prompts in llama.cpp, which aborts its process if a file is wrong.

    python run_llama_cpp.py REQUEST.json ANSWER.json

The request holds the model's path, prompts as token ids or text, the number of likely next tokens
to return, and the number of threads. The answer holds, for each prompt, one list of
[token id, log-probability] and the prompt's number of tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Tokens to try until one is a whole piece of text; few models have this many that are not.
MAX_TRIALS = 400


def load(path: str, context_length: int, num_threads: int) -> Any:
    """A server in this process, with a key-value cache in float32."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = context_length
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.verbosity = -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = num_threads
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    # flash attention rounds to float16
    kinds = xllamacpp.llama_flash_attn_type
    parameters.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(parameters)


class Prober:
    """Asks for the distribution of the next token.

    The server gives no log-probabilities if the token that it draws is only part of a character.
    A bias forces another token, until one works; log-probabilities do not include the bias.
    """

    def __init__(self, server: Any, num_likely: int) -> None:
        self.server = server
        self.num_likely = num_likely
        self.drawn = 3

    def next_token(self, prompt: list[int] | str) -> tuple[list[list[float]], int]:
        """The most likely tokens with log-probabilities, and the prompt's number of tokens."""
        request = {
            "prompt": prompt,
            "n_predict": 1,
            "n_probs": self.num_likely,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": True,
        }
        for _ in range(MAX_TRIALS):
            answer = self.server.handle_completions(
                request | {"logit_bias": [[self.drawn, 1000.0]]}
            )
            if "choices" not in answer:
                raise RuntimeError(f"llama.cpp answered {answer}")
            found = answer["choices"][0]["logprobs"]
            if found is not None:
                likely = found["content"][0]["top_logprobs"]
                pairs = [[entry["id"], entry["logprob"]] for entry in likely]
                return pairs, answer["usage"]["prompt_tokens"]
            self.drawn += 1
        raise RuntimeError("llama.cpp gave no log-probabilities")


def main(request_path: str, answer_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    server = load(request["model"], request["context_length"], request["num_threads"])
    prober = Prober(server, request["num_likely"])
    answers = [prober.next_token(prompt) for prompt in request["prompts"]]
    Path(answer_path).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
