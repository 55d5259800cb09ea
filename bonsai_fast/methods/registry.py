"""All methods by name: those that remove units, and those that zero weights."""

from __future__ import annotations

from typing import Any

from bonsai_fast.config.choices import MethodName, UnitMethodName
from bonsai_fast.methods.method import Method
from bonsai_fast.methods.units import one_shot
from bonsai_fast.methods.units.bonsai import Bonsai
from bonsai_fast.methods.units.flap import Flap
from bonsai_fast.methods.units.layerwise import LayerwisePPL
from bonsai_fast.methods.units.mini_llm.mini_llm import MiniLLM
from bonsai_fast.methods.units.policy_gradient.policy_gradient import PolicyGradient
from bonsai_fast.methods.units.reap import Reap
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
    "reap": Reap(),
}

# those that can say what an expert is worth
EXPERT_METHODS: tuple[UnitMethodName, ...] = (
    "bonsai",
    "reap",
    "wanda-sp",
    "magnitude-l1",
    "magnitude-l2",
    "random",
    "layerwise-ppl",
    "taylor",
    "policy-gradient",
)

WEIGHT_METHODS: dict[str, WeightMethod] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
}

# what a person should know to choose one
SUMMARIES: dict[MethodName, str] = {
    "bonsai": "scores random sub-models and estimates from their losses what each part is worth.",
    "wanda-sp": "removes units with small weights times inputs, after one forward pass.",
    "magnitude-l1": "removes units with small weights, by the sum of absolute values.",
    "magnitude-l2": "removes units with small weights, by the sum of squares.",
    "random": "removes units at random, for comparison.",
    "layerwise-ppl": "removes the decoder layers without which the loss is lowest.",
    "flap": "removes units whose output varies little, and adds their mean output as a bias.",
    "taylor": "removes units with small weights times gradients. Only it needs a backward pass.",
    "policy-gradient": "learns from losses with what probability each part should be kept.",
    "mini-llm": "removes units with small weights times gradients times activations; the gradients "
    "are estimated from losses.",
    "reap": "removes experts (of a mixture) with small outputs where the router chooses them.",
    "magnitude": "sets small weights to zero. It reads no text.",
    "wanda": "sets weights to zero that are small when multiplied by the size of their input.",
    "sparsegpt": "sets weights to zero and adjusts the others to make up for them.",
}
