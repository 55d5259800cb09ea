"""The ops, registered with PyTorch: CUDA tensors get Triton, all others a path in plain PyTorch."""

from bonsai_fast.ops.attention import grouped_attention, kept_head_proj, kept_o_proj
from bonsai_fast.ops.columns import column_moments, compact_columns, compact_rows
from bonsai_fast.ops.mlp import glu_mask, kept_down_proj, kept_up_proj
from bonsai_fast.ops.nll import BLOCK_LOGITS, lm_head_nll, token_nll
from bonsai_fast.ops.plans import HeadLists, KeptLists, RowPlan, SequencePlan

__all__ = [
    "BLOCK_LOGITS",
    "HeadLists",
    "KeptLists",
    "RowPlan",
    "SequencePlan",
    "column_moments",
    "compact_columns",
    "compact_rows",
    "glu_mask",
    "grouped_attention",
    "kept_down_proj",
    "kept_head_proj",
    "kept_o_proj",
    "kept_up_proj",
    "lm_head_nll",
    "token_nll",
]
