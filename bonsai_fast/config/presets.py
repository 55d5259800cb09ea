"""Values that a preset fills in where the user gave none."""

from __future__ import annotations

from typing import Any

from bonsai_fast.config.choices import (
    Method,
    Preset,
)

PRESETS: dict[Preset, dict[str, Any]] = {
    # paper: tables 8 and 9; one round removes p_iter = 0.05, so `rounds` follows from the target
    "paper": {
        "attention": "head",
        "submodels_per_round": 200,
        "num_sequences": 32,
        "regression": "paper",
        "prior": "wanda",
        "head_layout": "free",
        "round_to": "1",
    },
    "default": {
        "attention": "kv-group",
        "num_sequences": 64,
        "sequence_length": 256,
        "regression": "groups",
        "prior": "wanda",
        "head_layout": "rectangular",
        "round_to": "auto",
    },
}


WEIGHT_PRESETS: dict[Preset, dict[str, Any]] = {
    # Sun et al., appendix A.1: of C4, which is left to the user
    "paper": {"num_sequences": 128, "sequence_length": 2048},
    "default": {"num_sequences": 64, "sequence_length": 256},
}


# what a method's own paper sets otherwise
METHOD_PRESETS: dict[tuple[Method, Preset], dict[str, Any]] = {
    ("taylor", "paper"): {"spare_first": 4, "spare_last": 2},
    ("mini-llm", "paper"): {
        "num_sequences": 128,
        "sequence_length": 128,
        "perturbation": "weights-divided",
        "directions": 1,
        "granularity": "units",
        "spare_first": 4,
        "spare_last": 3,
    },
    ("mini-llm", "default"): {
        "perturbation": "weights",
        "directions": 8,
        "granularity": "blocks",
        "spare_first": 4,
        "spare_last": 3,
    },
    # section 4.1, but for the text: one epoch of 120,000 segments there
    ("policy-gradient", "paper"): {
        "num_sequences": 8192,
        "sequence_length": 128,
        "rounds": 15000,
        "batch_size": 8,
        "submodels_per_round": 2,
        "learning_rate": 2e-3,
        "granularity": "units",
        "baseline": "moving-average",
        "initial": "wanda-sp",
        "projection": "sigmoid-norm",
    },
    ("policy-gradient", "default"): {
        "rounds": 20,
        "batch_size": 1,
        "submodels_per_round": 32,
        "learning_rate": 0.03,
        "granularity": "shares",
        "baseline": "leave-one-out",
        "initial": "wanda-sp",
        "projection": "sigmoid-budget",
    },
}
