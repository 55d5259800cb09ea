"""Options of recovery: what is done so that a pruned model is worth running."""

from __future__ import annotations

from dataclasses import dataclass, fields

from bonsai_fast.config.choices import RecoverName, RecoverWeights
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
        shown="none",
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

    @property
    def recovery(self) -> RecoverOptions:
        """These options alone, where they are part of others."""
        names = [item.name for item in fields(RecoverOptions)]
        return RecoverOptions(**{name: getattr(self, name) for name in names})
