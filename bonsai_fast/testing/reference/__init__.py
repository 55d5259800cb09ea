"""Naive PyTorch truth of every op: short, obviously right, what tests hold the fast paths to."""

from bonsai_fast.testing.reference.attention import (
    grouped_attention_reference,
    kept_head_proj_reference,
    kept_o_proj_reference,
)
from bonsai_fast.testing.reference.columns import (
    column_moments_reference,
    compact_columns_reference,
    compact_rows_reference,
)
from bonsai_fast.testing.reference.losses import lm_head_nll_reference, token_nll_reference
from bonsai_fast.testing.reference.mlp import (
    glu_mask_reference,
    kept_down_proj_reference,
    kept_up_proj_reference,
)
from bonsai_fast.testing.reference.sparsity import keep_best_reference, prune_columns_reference

__all__ = [
    "column_moments_reference",
    "compact_columns_reference",
    "compact_rows_reference",
    "glu_mask_reference",
    "grouped_attention_reference",
    "keep_best_reference",
    "kept_down_proj_reference",
    "kept_head_proj_reference",
    "kept_o_proj_reference",
    "kept_up_proj_reference",
    "lm_head_nll_reference",
    "prune_columns_reference",
    "token_nll_reference",
]
