"""All methods by name: those that remove units, and those that zero weights."""

from __future__ import annotations

from typing import Any

from bonsai_fast.methods.method import Method
from bonsai_fast.methods.units import one_shot
from bonsai_fast.methods.units.bonsai import Bonsai
from bonsai_fast.methods.units.flap import Flap
from bonsai_fast.methods.units.layerwise import LayerwisePPL
from bonsai_fast.methods.units.mini_llm.mini_llm import MiniLLM
from bonsai_fast.methods.units.policy_gradient.policy_gradient import PolicyGradient
from bonsai_fast.methods.units.taylor import Taylor
from bonsai_fast.methods.weights.magnitude import Magnitude
from bonsai_fast.methods.weights.sparsegpt import SparseGPT
from bonsai_fast.methods.weights.wanda import Wanda
from bonsai_fast.methods.weights.weight_method import WeightMethod

METHODS: dict[str, Method[Any]] = {
    "bonsai": Bonsai(),
    "wanda-sp": one_shot.WANDA_SP,
    "magnitude-l1": one_shot.MAGNITUDE_L1,
    "magnitude-l2": one_shot.MAGNITUDE_L2,
    "random": one_shot.RANDOM,
    "layerwise-ppl": LayerwisePPL(),
    "flap": Flap(),
    "taylor": Taylor(),
    "policy-gradient": PolicyGradient(),
    "mini-llm": MiniLLM(),
}

WEIGHT_METHODS: dict[str, WeightMethod] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
}
