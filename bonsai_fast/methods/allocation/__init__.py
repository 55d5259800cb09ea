"""Which units to remove: from relevance and a budget to the final keep mask."""

from bonsai_fast.methods.allocation.finish import TOLERANCE, Achieved, finish
from bonsai_fast.methods.allocation.parameter_count import RemovedCount, group_costs
from bonsai_fast.methods.allocation.rectangular_heads import make_rectangular
from bonsai_fast.methods.allocation.relevance import equal_shares, spare_layers, standardised
from bonsai_fast.methods.allocation.round_widths import auto_multiple, round_widths
from bonsai_fast.methods.allocation.select import Order, plan_mask, select_units
from bonsai_fast.methods.allocation.target import Target
from bonsai_fast.methods.allocation.uniform import make_uniform

__all__ = [
    "TOLERANCE",
    "Achieved",
    "Order",
    "RemovedCount",
    "Target",
    "auto_multiple",
    "equal_shares",
    "finish",
    "group_costs",
    "make_rectangular",
    "make_uniform",
    "plan_mask",
    "round_widths",
    "select_units",
    "spare_layers",
    "standardised",
]
