"""From scored sub-models to the relevance of every unit.

`fit_paper` is the Bonsai paper's estimator; `fit_ridge` is a Bayesian one in closed form, with
error bars.
"""

from bonsai_fast.methods.regression.estimate import Regression
from bonsai_fast.methods.regression.kendall import kendall_tau
from bonsai_fast.methods.regression.paper_estimator import TABLE_8, Grid, fit_paper
from bonsai_fast.methods.regression.record import (
    RecordedRegression,
    load_regression,
    save_regression,
)
from bonsai_fast.methods.regression.ridge import fit_ridge

__all__ = [
    "TABLE_8",
    "Grid",
    "RecordedRegression",
    "Regression",
    "fit_paper",
    "fit_ridge",
    "kendall_tau",
    "load_regression",
    "save_regression",
]
