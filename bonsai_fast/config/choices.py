"""The values that options may take, each set once."""

from __future__ import annotations

from typing import Literal

UnitMethodName = Literal[
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
    "reap",
]
WeightMethodName = Literal["magnitude", "wanda", "sparsegpt"]
MethodName = Literal[UnitMethodName, WeightMethodName]
PresetName = Literal["default", "paper"]

# what is removed
AttentionUnit = Literal["head", "kv-group"]
ExpertUnit = Literal["expert", "channel"]
HeadLayout = Literal["rectangular", "free"]
CompareWithin = Literal["layer", "input", "input-128", "output", "output-128"]

# how it is found
RegressionName = Literal["groups", "ridge", "paper"]
PriorName = Literal["wanda", "activation", "fluctuation", "uniform", "obs", "reap"]
PriorOrAuto = Literal["auto", PriorName]
Granularity = Literal["units", "blocks", "layers"]
GranularityOrShares = Literal[Granularity, "shares"]
Baseline = Literal["moving-average", "leave-one-out", "antithetic"]
Initial = Literal["wanda-sp", "random", "random-progressive", "layerwise-ppl"]
Projection = Literal["sigmoid-budget", "sigmoid-norm", "score-const"]
Perturbation = Literal["weights", "weights-divided", "gates"]

# what is done after pruning
Tier = Literal[
    "compensate", "reconstruct", "distill", "bonsai", "wanda-lora", "mini-llm", "policy-gradient"
]
RecoverName = Literal["none", Tier]
RecoverWeights = Literal["lora", "all", "norms"]
RecoverTeacher = Literal["auto", "live", "cached"]
RecoverKL = Literal["code", "paper"]

# how it is computed
EngineName = Literal["auto", "hooks", "fused"]
ConcreteRoute = Literal["dense", "slice", "gather"]
Route = Literal["auto", ConcreteRoute, "pack", "tail", "split"]
Precision = Literal["full", "int8", "fp8"]
ModelDtype = Literal["auto", "float32", "bfloat16", "float16"]
GGUFPrecision = Literal["f32", "f16", "bf16", "q8_0"]
