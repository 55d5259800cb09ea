"""Sub-models scored per second: the hooks engine against the loops that one would write without it.

    one_by_one   every sub-model by itself: hooks multiply its masks in, HF computes logits and loss
    batched      several sub-models in one batch: hooks multiply masks row by row, HF computes all
                 logits, one loss

All three are timed on the same masks and tokens in one run. Work is counted as what the parent
costs: masked units are computed and thrown away by all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bonsai_fast.embedded import embedded_model
from bonsai_fast.models import AttentionBlock
from bonsai_fast.scoring import MaskScorer
from bonsai_fast.testing import synchronized_timer
from bonsai_fast.units import Layout

Score = Callable[[PreTrainedModel, Layout, torch.Tensor, torch.Tensor], torch.Tensor]

NUM_SEQUENCES, LENGTH, SHARE_KEPT = 4, 128, 0.95
# sub-models in one batch of `batched`; its logits take 8 * 4 * 128 * 49152 * (2 + 4) bytes = 1.2 GB
BATCH = 8


def _multiplied(model: PreTrainedModel, layout: Layout, keep: torch.Tensor, rows: int) -> list:
    """Hooks that multiply each of `len(keep)` sub-models' masks into its `rows` sequences."""
    handles = []
    for block, kept in layout.keep_by_block(keep):
        width = block.head_dim if isinstance(block, AttentionBlock) else 1
        projection = model.get_submodule(block.output)
        columns = kept.repeat_interleave(width, dim=1).repeat_interleave(rows, dim=0)[:, None]
        factor = columns.to(projection.weight.device, projection.weight.dtype)
        handles.append(
            projection.register_forward_pre_hook(lambda _, args, f=factor: (args[0] * f,))
        )
    return handles


@torch.inference_mode()
def _chunk(
    model: PreTrainedModel, layout: Layout, keep: torch.Tensor, input_ids: torch.Tensor
) -> torch.Tensor:
    handles = _multiplied(model, layout, keep, len(input_ids))
    try:
        tokens = input_ids.repeat(len(keep), 1)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    finally:
        for handle in handles:
            handle.remove()
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses.mean(dim=1).view(len(keep), len(input_ids)).cpu()


def one_by_one(
    model: PreTrainedModel, layout: Layout, keep: torch.Tensor, input_ids: torch.Tensor
) -> torch.Tensor:
    return torch.cat([_chunk(model, layout, row[None], input_ids) for row in keep])


def batched(
    model: PreTrainedModel, layout: Layout, keep: torch.Tensor, input_ids: torch.Tensor
) -> torch.Tensor:
    return torch.cat([_chunk(model, layout, rows, input_ids) for rows in keep.split(BATCH)])


def hooks(
    model: PreTrainedModel, layout: Layout, keep: torch.Tensor, input_ids: torch.Tensor
) -> torch.Tensor:
    return MaskScorer(model, layout=layout, engine="hooks").score(keep, input_ids)


IMPLS: dict[str, Score] = {"one_by_one": one_by_one, "batched": batched, "hooks": hooks}


@pytest.fixture(scope="module")
def parents(device: torch.device) -> Callable[[str], PreTrainedModel]:
    """Models by name, loaded once."""
    loaded: dict[str, PreTrainedModel] = {}

    def load(name: str) -> PreTrainedModel:
        if name not in loaded:
            torch.manual_seed(0)
            if name == "smoke":
                sizes = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2}
                heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
                model = LlamaForCausalLM(LlamaConfig(vocab_size=211, **sizes, **heads))
            else:
                model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16)
            loaded[name] = model.to(device).eval()
        return loaded[name]

    return load


@pytest.mark.benchmark(timer=synchronized_timer)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("name", "num_submodels"),
    [pytest.param("smoke", 3, id="smoke"), pytest.param("SmolLM2-135M", 16, id="SmolLM2-135M")],
)
def bench_scoring(benchmark, parents, device, name, num_submodels, impl):
    model = parents(name)
    layout = Layout.of(model)
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(num_submodels, len(layout), generator=generator) < SHARE_KEPT
    input_ids = torch.randint(
        0, model.config.vocab_size, (NUM_SEQUENCES, LENGTH), generator=generator
    ).to(device)
    benchmark.group = f"score {num_submodels} sub-models, {NUM_SEQUENCES} x {LENGTH} tokens, {name}"
    losses = benchmark.pedantic(
        IMPLS[impl], args=(model, layout, keep, input_ids), rounds=3, warmup_rounds=1
    )
    tokens = num_submodels * input_ids.numel()
    flops = 2 * tokens * model.num_parameters()  # tied embeddings: the LM head is in there once
    benchmark.extra_info |= {"baseline": "one_by_one", "tokens": tokens, "flops": flops}
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["submodels_per_s"] = num_submodels / seconds
        benchmark.extra_info["gflop_per_s"] = flops / seconds / 1e9
    expected = one_by_one(model, layout, keep[-2:], input_ids)
    torch.testing.assert_close(losses[-2:].cpu(), expected, rtol=0, atol=0.02)
