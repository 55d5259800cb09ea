"""Pruning methods of two kinds: which units stay (METHODS), which weights (WEIGHT_METHODS)."""

from bonsai_fast.methods.equal_tokens import KNOBS, within_tokens
from bonsai_fast.methods.method import Compensates, Method
from bonsai_fast.methods.session import NotRecordedError, Search
from bonsai_fast.methods.task import Plan, Task
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
from bonsai_fast.methods.weights.weight_method import Choice, WeightMethod

METHODS: dict[str, Method] = {
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

__all__ = [
    "KNOBS",
    "METHODS",
    "WEIGHT_METHODS",
    "Choice",
    "Compensates",
    "Method",
    "NotRecordedError",
    "Plan",
    "Search",
    "Task",
    "WeightMethod",
    "within_tokens",
]
