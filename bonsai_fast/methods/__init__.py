"""Pruning methods of two kinds: which units stay (METHODS), which weights (WEIGHT_METHODS)."""

from bonsai_fast.methods import one_shot
from bonsai_fast.methods.bonsai import Bonsai
from bonsai_fast.methods.budget import KNOBS, within_tokens
from bonsai_fast.methods.flap import Flap
from bonsai_fast.methods.layerwise import LayerwisePPL
from bonsai_fast.methods.magnitude import Magnitude
from bonsai_fast.methods.mini_llm import MiniLLM
from bonsai_fast.methods.policy_gradient import PolicyGradient
from bonsai_fast.methods.search import Compensates, Method, NotRecordedError, Plan, Search, Task
from bonsai_fast.methods.sparsegpt import SparseGPT
from bonsai_fast.methods.taylor import Taylor
from bonsai_fast.methods.wanda import Wanda
from bonsai_fast.methods.weights import Choice, WeightMethod

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
