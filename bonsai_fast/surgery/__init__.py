"""Units go for real: a smaller model in memory, and its directory on disk."""

from bonsai_fast.surgery.kept import kept_positions
from bonsai_fast.surgery.live import remove_units
from bonsai_fast.surgery.save import save_pretrained
from bonsai_fast.surgery.verify import SavedModelError, verify_saved

__all__ = [
    "SavedModelError",
    "kept_positions",
    "remove_units",
    "save_pretrained",
    "verify_saved",
]
