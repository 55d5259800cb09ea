"""Options of recovery: what is done so that a pruned model is worth running."""

from __future__ import annotations

from dataclasses import dataclass, fields

from bonsai_fast.config.choices import RecoverKL, RecoverName, RecoverTeacher, RecoverWeights
from bonsai_fast.config.options import RECOVERY, option

PUBLISHED: tuple[RecoverName, ...] = ("bonsai", "wanda-lora", "mini-llm", "policy-gradient")
TRAINS: tuple[RecoverName, ...] = ("reconstruct", "distill", *PUBLISHED)


@dataclass(frozen=True, kw_only=True)
class RecoverOptions:
    """How a pruned model is made better again, with its parent as the teacher."""

    recover: RecoverName | None = option(
        None,
        "compensate: refit output projections in closed form, forward passes only. reconstruct: "
        "also train each layer to give its parent's output. distill: compensate, then train "
        "against the parent's predictions. bonsai, wanda-lora, mini-llm, policy-gradient: the "
        "training that these papers publish.",
        group=RECOVERY,
        shown="compensate; none with preset paper or zeroed weights",
    )
    recover_weights: RecoverWeights = option(
        "lora",
        "What distill trains: low-rank adapters of the linear layers, which are merged; all "
        "weights of the decoder; or its norms and biases.",
        group=RECOVERY,
        read_with={"recover": ("distill",)},
    )
    recover_text: str | None = option(
        None,
        "Text that is trained on, named like --calibration.",
        group=RECOVERY,
        read_with={"recover": TRAINS},
        shown="the calibration text",
        value="TEXT",
    )
    recover_tokens: int | None = option(
        None,
        "Tokens to train on: of distill in all, of reconstruct those that every layer sees.",
        group=RECOVERY,
        minimum=1,
        read_with={"recover": TRAINS},
        shown="set by the method",
    )
    recover_minutes: float | None = option(
        None,
        "Stop training after this time, with the learning rate brought down by then.",
        group=RECOVERY,
        positive=True,
        read_with={"recover": TRAINS},
        shown="no limit",
    )
    recover_rank: int | None = option(
        None,
        "Rank of the adapters.",
        group=RECOVERY,
        read_with={"recover": ("distill",)},
        minimum=1,
        shown="8",
    )
    recover_rate: float | None = option(
        None,
        "The highest learning rate.",
        group=RECOVERY,
        read_with={"recover": ("distill",)},
        positive=True,
        shown="0.001; 0.0001 with --recover-weights all",
    )
    recover_batch: int | None = option(
        None,
        "Sequences per training step, of all processes together.",
        group=RECOVERY,
        read_with={"recover": ("distill",)},
        minimum=1,
        shown="1",
    )
    recover_cross_entropy: float | None = option(
        None,
        "Add the loss of the text's next tokens, times this, to the divergence that distill "
        "trains on.",
        group=RECOVERY,
        read_with={"recover": ("distill",)},
        positive=True,
        shown="not added",
    )
    recover_hidden: float | None = option(
        None,
        "Add the relative squared error of the last hidden states, times this, to the loss of "
        "distill.",
        group=RECOVERY,
        read_with={"recover": ("distill",)},
        positive=True,
        shown="not added",
    )
    recover_kl: RecoverKL | None = option(
        None,
        "The divergence in the loss of bonsai. code: KL(parent || model), summed over the tokens "
        "of a sequence, as its code has it. paper: KL(model || parent), mean over tokens.",
        group=RECOVERY,
        read_with={"recover": ("bonsai",)},
        shown="code",
    )
    recover_teacher: RecoverTeacher = option(
        "auto",
        "live: the parent is run in every step. cached: it is run once, its last hidden states "
        "are kept on the disk, and a GPU's memory is free of it during training. auto: cached "
        "where text is read more than once and there is no time limit, or where the parent is "
        "streamed.",
        group=RECOVERY,
        read_with={"recover": ("distill", "bonsai")},
    )

    @property
    def recovery(self) -> RecoverOptions:
        """These options alone, where they are part of others."""
        names = [item.name for item in fields(RecoverOptions)]
        return RecoverOptions(**{name: getattr(self, name) for name in names})
