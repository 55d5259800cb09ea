"""From tokens and minutes to steps of a layer."""

from __future__ import annotations

import math
import time

from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.recovery.reconstruct.layer_training import LayerTraining
from bonsai_fast.recovery.recovery_task import RecoveryTask

# tokens that every layer sees, unless asked for otherwise
DEFAULT_TOKENS = 102_400
# tokens in a batch; longer sequences are one batch each
BATCH_TOKENS = 512
LEARNING_RATE = 1e-2
CHECKS = 5
# tokens in a sequence
LENGTH = 256
# how often training reads a sequence
EPOCHS = 2


def distinct_tokens(options: RecoverOptions) -> int:
    """Tokens of text to draw; training reads each `EPOCHS` times."""
    return max(LENGTH, _tokens(options) // EPOCHS)


def training_of(task: RecoveryTask) -> LayerTraining:
    """How every layer is trained.

    Raises:
        ValueError: fewer tokens than a batch.
    """
    sequences, length = task.text.input_ids.shape
    batch = min(sequences, max(1, BATCH_TOKENS // length))
    tokens = _tokens(task.options)
    steps = tokens // (batch * length)
    if steps == 0:
        raise ValueError(
            f"recover tokens: reconstruct trains on batches of {batch} x {length} tokens, "
            f"expected at least {batch * length}, got {tokens}"
        )
    held_out, held_out_length = task.held_out.input_ids.shape
    # the held-out text is read more often than trained on otherwise
    affordable = tokens // (CHECKS * held_out_length)
    return LayerTraining(
        steps=steps,
        batch=batch,
        learning_rate=LEARNING_RATE,
        checks=CHECKS,
        held_out=min(held_out, max(1, affordable)),
        seed=task.seed,
    )


class Clock:
    """Shares the minutes of a task among its layers.

    Args:
        minutes: that all starts may take; None: as long as it takes.
        spent: seconds of earlier starts.
    """

    def __init__(self, minutes: float | None, spent: float) -> None:
        self._spent = spent
        self._started = time.perf_counter()
        self._end = None if minutes is None else self._started + 60 * minutes - spent

    @property
    def seconds(self) -> float:
        """Wall time of all starts."""
        return self._spent + time.perf_counter() - self._started

    def deadline(self, layers: int, reserve: float) -> float:
        """When the next of so many layers should be trained, of `time.perf_counter()`; or inf.

        Args:
            layers: that are left to train.
            reserve: seconds of other work.
        """
        if self._end is None:
            return math.inf
        now = time.perf_counter()
        return now + (self._end - reserve - now) / layers


def _tokens(options: RecoverOptions) -> int:
    """Tokens that every layer sees."""
    return DEFAULT_TOKENS if options.recover_tokens is None else options.recover_tokens
