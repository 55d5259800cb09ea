"""What a training will do, from its task: recipe, sequences, batches, files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from bonsai_fast.checkpoints.streaming import stream_of
from bonsai_fast.config.choices import Tier
from bonsai_fast.recovery.distill.choose_trained import has_tied_head, num_trained
from bonsai_fast.recovery.distill.published_recipes import NOT_PUBLISHED
from bonsai_fast.recovery.distill.recipe import Recipe
from bonsai_fast.recovery.distill.recipe_choice import recipe_of
from bonsai_fast.recovery.distill.teacher_states import states_bytes
from bonsai_fast.recovery.distill.training_state import state_bytes
from bonsai_fast.recovery.recovery_task import RecoveryTask
from bonsai_fast.runs.identity import fingerprint

# tokens that are run at once; further sequences of a batch are accumulated
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 8192}
# measurements on held-out text: at most so many, and at most this share of the work
MEASUREMENTS = 8
MEASURED_SHARE = 0.1
# a step costs about as much as so many forward passes: the parent's, forth and back
PASSES_PER_STEP = 4


@dataclass(frozen=True, eq=False)
class TrainingPlan:
    """The work of a tier that trains.

    Args:
        tier: its name.
        task: what it is given.
    """

    tier: Tier
    task: RecoveryTask

    @cached_property
    def recipe(self) -> Recipe:
        """The hyper-parameters.

        Raises:
            ValueError: an option has no effect on this tier, or tokens are too few.
        """
        task = self.task
        model_type = task.teacher.config.model_type
        recipe = recipe_of(self.tier, task.options, model_type=model_type, length=self.length)
        available = recipe.epochs * task.text.input_ids.numel()
        if recipe.published_tokens and task.options.recover_tokens is None and available:
            # papers do not read a short text more often
            recipe = recipe.with_tokens(min(recipe.tokens, available), self.length)
        # a tied head is the embeddings
        return replace(recipe, head=recipe.head and not has_tied_head(task.student))

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.task.text.input_ids.shape[1]

    @property
    def sequences(self) -> int:
        """Sequences to train on, over all epochs."""
        return max(1, self.recipe.tokens // self.length)

    @property
    def is_cached(self) -> bool:
        """Whether the parent's states are kept on the disk."""
        options = self.task.options
        if not self.recipe.terms.need_parent or options.recover_teacher == "live":
            return False
        if options.recover_teacher == "cached" or stream_of(self.task.teacher) is not None:
            return True
        is_read_again = self.sequences > self.task.text.input_ids.shape[0]
        return is_read_again and options.recover_minutes is None

    @property
    def disk_bytes(self) -> int:
        """Of the files of the training, and of the parent's states."""
        needed = state_bytes(num_trained(self.task.student, self.recipe))
        if self.is_cached:
            sequences, teacher = self.task.text.input_ids.shape[0], self.task.teacher
            hidden_size = teacher.get_output_embeddings().weight.shape[1]
            needed += states_bytes(sequences, self.length, hidden_size, teacher.dtype)
        return needed

    @property
    def training_bytes(self) -> int:
        """Memory for trained parameters, their gradients and the optimiser's two moments."""
        return 4 * 4 * num_trained(self.task.student, self.recipe)

    def rows(self, processes: int) -> int:
        """Sequences that each of several processes runs at once."""
        limit = TOKENS_AT_ONCE.get(self.task.student.device.type, TOKENS_AT_ONCE["cpu"])
        return max(1, min(-(-self.recipe.batch // processes), limit // self.length))

    @property
    def measurements(self) -> int:
        """How often the model is measured in the training, the end included."""
        tokens = self.sequences * self.length
        held_out = self.task.held_out.input_ids.numel()
        affordable = MEASURED_SHARE * PASSES_PER_STEP * tokens / held_out
        return max(1, min(MEASUREMENTS, int(affordable)))

    @property
    def identity(self) -> dict[str, float | int | str]:
        """What a start must share with an earlier one to continue it; to be taken before it."""
        task = self.task
        return {
            "tier": self.tier,
            "seed": task.seed,
            "text": task.text.sha256,
            "held_out": task.held_out.sha256,
            "model": fingerprint(task.student),
            **self.recipe.settings(),
        }

    @property
    def notes(self) -> list[str]:
        """What differs from what was published."""
        recipe, notes = self.recipe, []
        if recipe.published_tokens is not None and recipe.tokens != recipe.published_tokens:
            notes.append(
                f"trained on {recipe.tokens:,} tokens in batches of {recipe.batch}; the paper on "
                f"{recipe.published_tokens:,}"
            )
        if recipe.name in NOT_PUBLISHED:
            notes.append(NOT_PUBLISHED[recipe.name])
        if recipe.name == "bonsai" and not recipe.head:
            notes.append("the LM head is tied to the embeddings and stays frozen; bonsai trains it")
        return notes
