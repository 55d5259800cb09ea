"""The values that options may take."""

from __future__ import annotations

from typing import Literal

WeightMethodName = Literal["magnitude", "wanda", "sparsegpt"]


Method = Literal[
    "bonsai",
    "wanda-sp",
    "magnitude-l1",
    "magnitude-l2",
    "random",
    "layerwise-ppl",
    "flap",
    "taylor",
    "policy-gradient",
    "mini-llm",
    "magnitude",
    "wanda",
    "sparsegpt",
]


Preset = Literal["default", "paper"]


AttentionGranularity = Literal["head", "kv-group"]


RouteName = Literal["dense", "slice", "gather", "pack", "tail", "split"]


Route = Literal["auto", RouteName]


EngineName = Literal["auto", "hooks", "fused"]


HeadLayout = Literal["rectangular", "free"]


RegressionName = Literal["groups", "ridge", "paper"]


PriorChoice = Literal["wanda", "activation", "fluctuation", "uniform"]


Granularity = Literal["units", "blocks", "shares", "layers"]


Baseline = Literal["moving-average", "leave-one-out", "antithetic"]


Precision = Literal["int8", "fp8"]


Initial = Literal["wanda-sp", "random", "random-progressive", "layerwise-ppl"]


Projection = Literal["sigmoid-budget", "sigmoid-norm", "score-const"]


Perturbation = Literal["weights", "weights-divided", "gates"]
