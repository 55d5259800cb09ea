"""Every causal language model class of transformers works, or is refused before any work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decoder_checks import check_decoder, sublayers
from models_page import PAGE, row_of
from safetensors.torch import load_file
from surgery_cases import TOLERANCE, difference, tokens
from zoo import CLASSES, TYPES, VARIANTS, VOCABULARY, tiny_model

from bonsai_fast.models.layout import Layout
from bonsai_fast.surgery import remove_units, save_pretrained

WRITE = "write it anew with: PYTHONPATH=. python tests/models_page.py"
# their layers read keys and values of another model: they cannot run alone
ASSISTANTS = ("gemma4_assistant", "gemma4_unified_assistant")
# of different kinds: they are loaded with the code that was saved with them
ALONE = ("cohere2", "gemma3_text", "gpt2", "starcoder2")
LOAD = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids = torch.tensor(eval(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.inference_mode():
        save_file({"logits": model(input_ids=ids).logits}, folder + "/logits.safetensors")
"""


@pytest.fixture(scope="module")
def lines() -> set[str]:
    """The lines of docs/models.md."""
    return set(PAGE.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("model_type", TYPES)
def test_it_works_or_is_refused(model_type: str, lines: set[str], tmp_path: Path) -> None:
    model = tiny_model(model_type)
    if model_type not in ASSISTANTS:  # or nothing below would mean anything
        with torch.no_grad():
            logits = model(input_ids=tokens(batch=4), use_cache=False).logits
        assert logits.isfinite().all() and logits.std() > 0.05
        assert logits.shape[-1] == VOCABULARY
    row = row_of(model_type, model)
    assert {row.line, *row.reasons} <= lines, f"docs/models.md is out of date: {WRITE}"
    if not row.refused:
        check_decoder(model, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_work_or_are_refused(name: str, tmp_path: Path) -> None:
    model_type, changes = VARIANTS[name]
    model = tiny_model(model_type, **changes)
    if not row_of(model_type, model).refused:
        check_decoder(model, tmp_path)


def test_the_page_lists_every_class_and_counts_them(lines: set[str]) -> None:
    rows = [line for line in lines if line.startswith("| `")]
    assert sorted(line.split("`")[1] for line in rows) == sorted(TYPES), WRITE
    works = [line for line in rows if line.count(" | ") > 1]
    print(f"{len(works)} of {len(CLASSES)} classes can be pruned")
    assert len(works) >= 55
    text = PAGE.read_text(encoding="utf-8")
    assert f"can be pruned: {len(works)} of the {len(CLASSES)} classes" in text, WRITE


def test_saved_models_need_nothing_but_their_own_code(tmp_path: Path) -> None:
    ids, expected = tokens(), {}
    for model_type in ALONE:
        model = tiny_model(model_type)
        layout = Layout.of(model, sublayers=True)
        cut = remove_units(model, layout, sublayers(layout))
        save_pretrained(cut, tmp_path / model_type)
        with torch.inference_mode():
            expected[model_type] = cut(input_ids=ids).logits
    folders = [str(tmp_path / model_type) for model_type in ALONE]
    # -P: a folder `kernels` in the working directory must not pass for the package
    command = [sys.executable, "-P", "-c", LOAD, str(ids.tolist()), *folders]
    own = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for model_type, logits in expected.items():
        found = load_file(tmp_path / model_type / "logits.safetensors")["logits"]
        assert difference(found, logits) < TOLERANCE, model_type
