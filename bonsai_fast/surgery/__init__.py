"""Remove units from a model, in memory or on disk, and save the smaller model.

`python -m bonsai_fast.surgery` prunes a model's directory without loading the model.
"""

from bonsai_fast.surgery.kept import kept_positions
from bonsai_fast.surgery.remove_units import remove_units
from bonsai_fast.surgery.save import save_pretrained
from bonsai_fast.surgery.slice_checkpoint import SliceResult, slice_checkpoint
from bonsai_fast.surgery.verify import SavedModelError, compare_logits, verify_saved

__all__ = [
    "SavedModelError",
    "SliceResult",
    "compare_logits",
    "kept_positions",
    "remove_units",
    "save_pretrained",
    "slice_checkpoint",
    "verify_saved",
]
