"""Naive PyTorch references, one file per op: short and obviously right. Tests compare with them."""

from bonsai_fast.testing.reference.column_moments import column_moments_reference
from bonsai_fast.testing.reference.compact import compact_columns_reference, compact_rows_reference
from bonsai_fast.testing.reference.glu_mask import glu_mask_reference
from bonsai_fast.testing.reference.grouped_attention import grouped_attention_reference
from bonsai_fast.testing.reference.kept_down_proj import kept_down_proj_reference
from bonsai_fast.testing.reference.kept_head_proj import kept_head_proj_reference
from bonsai_fast.testing.reference.kept_o_proj import kept_o_proj_reference
from bonsai_fast.testing.reference.kept_up_proj import kept_up_proj_reference
from bonsai_fast.testing.reference.lm_head_nll import lm_head_nll_reference
from bonsai_fast.testing.reference.sparsity import keep_best_reference, prune_columns_reference
from bonsai_fast.testing.reference.token_nll import token_nll_reference

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
