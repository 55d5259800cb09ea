"""Load a saved model in a fresh process and compare its logits."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# Runs with only transformers: the directory must hold everything else that it needs.
_LOAD_AND_RUN = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

directory, inputs, outputs, device, attention = sys.argv[1:]
config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
auto = AutoModelForCausalLM
if auto.__name__ not in getattr(config, "auto_map", {}) and type(config) not in auto._model_mapping:
    auto = AutoModelForImageTextToText  # a language model inside a wrapper
model, report = auto.from_pretrained(
    directory,
    dtype="auto",
    trust_remote_code=True,
    attn_implementation=attention or None,
    output_loading_info=True,
)
wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
assert not wrong, f"weights do not fit the model: {wrong}"
with torch.inference_mode():
    logits = model.to(device).eval()(load_file(inputs, device)["input_ids"]).logits
save_file({"logits": logits.float().cpu().contiguous()}, outputs)
"""


class SavedModelError(RuntimeError):
    """A saved model does not load, or gives other logits than expected."""


def verify_saved(
    directory: str | os.PathLike[str],
    input_ids: torch.Tensor,
    expected_logits: torch.Tensor,
    *,
    tolerance: float,
    attn_implementation: str | None = None,
) -> float:
    """Load a saved model in a fresh Python process, without bonsai_fast, and compare its logits.

    The directory's own Python files run there (`trust_remote_code=True`).

    Args:
        directory: of the saved model.
        input_ids: int64 [B, T].
        expected_logits: float [B, T, V]; the model is loaded on its device, in the dtype that was
            saved.
        tolerance: largest absolute difference that is accepted.
        attn_implementation: for the loaded model; the default if None.
    Returns:
        the largest absolute difference.
    Raises:
        SavedModelError: it does not load, weights are missing or left over, the shapes differ, a
            logit is NaN where none is expected, or the difference is above `tolerance`.
    """
    logits = fresh_logits(directory, input_ids, expected_logits.device, attn_implementation)
    expected = expected_logits.detach().float().cpu()
    return compare_logits(directory, logits, expected, tolerance=tolerance)


def compare_logits(
    directory: str | os.PathLike[str],
    logits: torch.Tensor,
    expected: torch.Tensor,
    *,
    tolerance: float,
) -> float:
    """The largest absolute difference between the logits of a saved model and the expected ones.

    Args:
        directory: of the saved model.
        logits, expected: float32 [B, T, V] on the CPU.
        tolerance: largest difference that is accepted.
    Raises:
        SavedModelError: the shapes differ, a logit is NaN, or the difference is above `tolerance`.
    """
    if logits.shape != expected.shape:
        raise SavedModelError(
            f"{directory} gives logits of shape {tuple(logits.shape)}, "
            f"expected {tuple(expected.shape)}"
        )
    difference = float((logits - expected).abs().max())
    if not difference <= tolerance:  # NaN is not
        raise SavedModelError(
            f"{directory} loads, but its logits differ by {difference:.3g}, "
            f"more than {tolerance:.3g}"
        )
    return difference


def fresh_logits(
    directory: str | os.PathLike[str],
    input_ids: torch.Tensor,
    device: torch.device,
    attn_implementation: str | None = None,
) -> torch.Tensor:
    """Logits that a fresh process computes on `device`: float32 [B, T, V] on the CPU."""
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "in.safetensors"), Path(scratch, "out.safetensors")
        save_file({"input_ids": input_ids.cpu().contiguous()}, inputs)
        # -P: a folder `kernels` in the working directory must not pass for the package.
        command = [sys.executable, "-P", "-c", _LOAD_AND_RUN, str(Path(directory).resolve())]
        command += [str(inputs), str(outputs), str(device), attn_implementation or ""]
        own = {"HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, env=os.environ | own, capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise SavedModelError(f"{directory} does not load in a fresh process: {last}")
        return load_file(outputs)["logits"]
