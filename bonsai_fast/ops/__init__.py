"""The ops of the fused engine, one file each. CUDA tensors get Triton kernels, others PyTorch."""

from bonsai_fast.ops.column_moments import column_moments
from bonsai_fast.ops.compact import compact_columns, compact_rows
from bonsai_fast.ops.glu_mask import glu_mask
from bonsai_fast.ops.grouped_attention import grouped_attention
from bonsai_fast.ops.kept_down_proj import kept_down_proj
from bonsai_fast.ops.kept_head_proj import kept_head_proj
from bonsai_fast.ops.kept_o_proj import kept_o_proj
from bonsai_fast.ops.kept_up_proj import kept_up_proj
from bonsai_fast.ops.lm_head_nll import lm_head_nll
from bonsai_fast.ops.plans import HeadLists, KeptLists, RowPlan, SequencePlan
from bonsai_fast.ops.token_nll import BLOCK_LOGITS, token_nll

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
