"""Forward-only structured pruning of LLMs: masked sub-models scored many per batch."""

from bonsai_fast.checkpoints.streaming import open_streamed, stream_layers
from bonsai_fast.config import PruneConfig
from bonsai_fast.config.recover_config import RecoverConfig
from bonsai_fast.hub import register
from bonsai_fast.methods import configure
from bonsai_fast.models.layout import Layout, Unit
from bonsai_fast.prune.job import prune
from bonsai_fast.prune.run_result import PruneResult, SparseResult
from bonsai_fast.recover.recover_job import recover
from bonsai_fast.recover.recover_result import RecoverResult
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.surgery import remove_units, save_pretrained

__version__ = "0.1.0"
__all__ = [
    "Layout",
    "MaskScorer",
    "PruneConfig",
    "PruneResult",
    "RecoverConfig",
    "RecoverResult",
    "SparseResult",
    "Unit",
    "configure",
    "open_streamed",
    "prune",
    "recover",
    "remove_units",
    "save_pretrained",
    "stream_layers",
]

# so that AutoModelForCausalLM.from_pretrained finds pruned models
register()
