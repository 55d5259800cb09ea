"""What a run is asked to do; the command line is generated from it, so that both agree."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

from bonsai_fast.config.choices import (
    AttentionGranularity,
    Baseline,
    Granularity,
    HeadLayout,
    Initial,
    Method,
    Perturbation,
    Precision,
    Preset,
    PriorChoice,
    Projection,
    RegressionName,
    RouteName,
    WeightMethodName,
)
from bonsai_fast.config.presets import METHOD_PRESETS, PRESETS, WEIGHT_PRESETS
from bonsai_fast.config.weight_pattern import UNSTRUCTURED, CompareWithin, Pattern


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How a model is pruned; fields that are None take the preset's value (see `resolved`)."""

    sparsity: float | None = _option(
        None,
        "Fraction of the decoder's parameters to remove, in (0, 1). Default 0.2; for methods that "
        "zero weights, the fraction of each matrix, by default 0.5.",
    )
    target: str | None = _option(
        None, "The same as sparsity=0.3 or, in parameters of the whole model, params=1.1B."
    )
    method: Method = _option("bonsai", "Pruning method.")
    preset: Preset = _option(
        "default",
        "'default' is the best that we know; 'paper' is the method's setting as published.",
    )
    calibration: str = _option(
        "builtin",
        "Calibration text: wikitext2, c4, hf:NAME[:CONFIG], FILE.txt, FILE.jsonl, self or builtin.",
    )
    evaluation: str | None = _option(
        None,
        "Text for perplexity, same names. "
        "Default: the held-out last quarter of the calibration text.",
    )
    evaluation_tokens: int = _option(8192, "How many tokens of it are read.")
    rounds: int | None = _option(None, "Rounds of sampling, scoring, regression and removal.")
    submodels_per_round: int | None = _option(None, "Sub-models scored in each round.")
    num_sequences: int | None = _option(None, "Calibration sequences.")
    sequence_length: int | None = _option(None, "Tokens in each of them.")
    attention: AttentionGranularity | None = _option(
        None, "Remove query heads one by one, or KV groups with all their query heads."
    )
    sublayers: bool = _option(
        False, "Let whole attention and MLP sub-layers compete as units of their own."
    )
    regression: RegressionName | None = _option(
        None, "How relevance is estimated: one unknown a layer and kind, or one a unit."
    )
    prior: PriorChoice | None = _option(None, "Importance of a unit before anything is scored.")
    head_layout: HeadLayout | None = _option(
        None,
        "'rectangular': the KV groups of a layer keep equally many query heads, "
        "which every engine can run.",
    )
    round_to: str | None = _option(
        None, "MLP widths become multiples of this: 'auto' (32 to 256 by size), or a number."
    )
    uniform: bool = _option(
        False, "Same widths in all layers, so that the parent's own class can hold the result."
    )
    seed: int = _option(0, "Seed of everything that is drawn.")
    memory_budget: str | None = _option(
        None,
        "Memory for scoring beside the weights, e.g. 800MB. "
        "Default 2GiB on a CPU, half of a GPU's memory.",
    )
    route: RouteName | None = _option(
        None,
        "How masked layers are computed: whole with zeros (dense), from copies of what each "
        "sub-model keeps (slice), by kernels that gather it (gather), from one copy of what any "
        "keeps (pack), with each one's part of that (tail), or with one product for what all keep "
        "and kernels that gather the rest (split). Default: what costs less, never split.",
    )
    precision: Precision | None = _option(
        None,
        "8-bit products while scoring: int8 (CPU or CUDA) or fp8 (CUDA from compute capability 8.9 "
        "on). Its ranking is compared with full precision first.",
    )
    spare_first: int | None = _option(
        None, "First decoder layers that a one-shot method leaves whole if the target allows it."
    )
    spare_last: int | None = _option(None, "Last decoder layers that it leaves whole.")
    granularity: Granularity | None = _option(
        None,
        "policy-gradient, mini-llm by gates: what varies: single units, blocks of channels, the "
        "share of each layer's attention and MLP that goes (policy-gradient), or whole layers.",
    )
    batch_size: int | None = _option(None, "policy-gradient: sequences of each step.")
    learning_rate: float | None = _option(None, "policy-gradient: of the keep probabilities.")
    baseline: Baseline | None = _option(
        None, "policy-gradient: what losses are compared with; 'antithetic' also draws in pairs."
    )
    initial: Initial | None = _option(None, "policy-gradient: where keep probabilities start.")
    projection: Projection | None = _option(
        None, "policy-gradient: from what they start to probabilities."
    )
    perturbation: Perturbation | None = _option(
        None,
        "mini-llm: what is perturbed; 'weights-divided' is the estimate as its paper prints it.",
    )
    perturbation_scale: float | None = _option(None, "mini-llm: size of a perturbation.")
    directions: int | None = _option(None, "mini-llm: perturbations that are averaged.")
    pattern: str | None = _option(
        None,
        "magnitude, wanda, sparsegpt: which zeros: 'unstructured' or N:M, N of M neighbours kept, "
        "such as 2:4.",
    )
    compare_within: CompareWithin | None = _option(
        None,
        "magnitude, wanda, sparsegpt: which weights of a matrix compete if the pattern does not "
        "say: all, those of an input or output, or of 128 neighbouring ones.",
    )
    weight_update: bool | None = _option(
        None,
        "magnitude, wanda, sparsegpt: whether the weights that stay make up for those that go.",
    )
    tasks: str | None = _option(
        None, "Zero-shot tasks for lm-evaluation-harness, separated by commas."
    )

    def __post_init__(self) -> None:
        if self.sparsity is not None and self.target is not None:
            raise ValueError("give sparsity or target, not both")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity: expected a fraction in (0, 1), got {self.sparsity}")
        for name, hint in get_type_hints(type(self)).items():
            _check_choice(name, hint, getattr(self, name))
        for name in (
            *("rounds", "submodels_per_round", "num_sequences", "evaluation_tokens"),
            *("batch_size", "directions"),
        ):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("learning_rate", "perturbation_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.method == "policy-gradient" and self.sublayers:
            raise ValueError("policy-gradient: expected granularity=layers instead of sublayers")
        if self.granularity == "shares":
            if self.method != "policy-gradient":
                raise ValueError(f"granularity: expected another than shares for {self.method}")
            if self.initial == "layerwise-ppl":
                raise ValueError("granularity=shares: expected another start than layerwise-ppl")
        _check_at_least("sequence_length", self.sequence_length, 2)
        for name in ("seed", "spare_first", "spare_last"):
            _check_at_least(name, getattr(self, name), 0)
        if self.round_to not in (None, "auto") and not (
            str(self.round_to).isdigit() and int(self.round_to) >= 1
        ):
            raise ValueError(
                f"round_to: expected 'auto' or a positive number, got {self.round_to!r}"
            )
        self._check_kind()

    def _check_kind(self) -> None:
        """Options of one kind of method mean nothing to the other."""
        foreign = ONLY_UNITS if self.prunes_weights else ONLY_WEIGHTS
        for item in fields(self):
            if item.name in foreign and getattr(self, item.name) != item.default:
                kinds = ("units", "weights") if self.prunes_weights else ("weights", "units")
                raise ValueError(
                    f"{item.name} is for methods that remove {kinds[0]}; "
                    f"{self.method} removes {kinds[1]}"
                )
        if self.prunes_weights:
            pattern = self.weight_pattern
            if pattern.group is not None and self.compare_within is not None:
                raise ValueError(
                    f"compare_within: pattern {self.pattern} compares {pattern.group} neighbours; "
                    f"leave one of them out"
                )

    @property
    def prunes_weights(self) -> bool:
        """Whether the method zeroes single weights rather than removes units."""
        return self.method in get_args(WeightMethodName)

    @property
    def weight_pattern(self) -> Pattern:
        """The pattern of a method that zeroes weights, with its sparsity."""
        return Pattern.parse(self.pattern or UNSTRUCTURED, self.sparsity)

    @property
    def target_text(self) -> str:
        """The target in the form `Target.parse` reads."""
        if self.target is not None:
            return self.target
        return f"sparsity={0.2 if self.sparsity is None else self.sparsity}"

    @property
    def task_names(self) -> list[str]:
        """What `tasks` lists."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]

    def resolved(self) -> PruneConfig:
        """The same with every value that was left to the preset filled in."""
        presets = WEIGHT_PRESETS if self.prunes_weights else PRESETS
        values = presets[self.preset] | METHOD_PRESETS.get((self.method, self.preset), {})
        return replace(
            self, **{name: value for name, value in values.items() if getattr(self, name) is None}
        )


ONLY_WEIGHTS = ("pattern", "compare_within", "weight_update")
ONLY_UNITS = (
    *("target", "rounds", "submodels_per_round", "attention", "sublayers", "regression", "prior"),
    *("head_layout", "round_to", "uniform", "spare_first", "spare_last", "granularity"),
    *("batch_size", "learning_rate", "baseline", "initial", "projection", "perturbation"),
    *("perturbation_scale", "directions"),
)


def _check_choice(name: str, hint: Any, value: Any) -> None:
    choices = get_args(hint)
    literal = next((get_args(choice) for choice in choices if get_args(choice)), ()) or (
        choices if choices and all(isinstance(choice, str) for choice in choices) else ()
    )
    if literal and value is not None and value not in literal:
        raise ValueError(f"{name}: expected one of {', '.join(literal)}, got {value!r}")


def _check_at_least(name: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def as_dict(config: PruneConfig) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {item.name: getattr(config, item.name) for item in fields(config)}
