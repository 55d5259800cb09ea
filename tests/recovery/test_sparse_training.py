"""Models whose single weights were pruned keep every zero, and are trained as they will be."""

import pytest
import torch
from torch.nn.functional import linear
from training_cases import LENGTH, parent, pruned, text_of, tiny_task, tiny_text, train

from bonsai_fast.recovery.distill.masked_lora import _MaskedUpdate
from bonsai_fast.recovery.distill.zero_masks import find_zeros


def two_of_four(model):
    """Zero the smaller two of every four weights of a row, in all linear layers of the decoder."""
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            groups = weight.data.view(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0.0)
    return model


def projections(model):
    return {
        n: w.detach().clone() for n, w in model.named_parameters() if n.endswith("_proj.weight")
    }


@pytest.mark.parametrize("weights", ["lora", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_zero_is_kept_and_the_merge_takes_nothing_away(tmp_path, weights, dtype):
    student, teacher = two_of_four(parent()).to(dtype), parent().to(dtype)
    before = projections(student)
    options = {"recover_weights": weights, "recover_tokens": 40 * LENGTH, "recover_batch": 4}
    # measured on the text itself, on which it must get better
    texts = {"text": tiny_text(20, seed=1), "held_out": tiny_text(20, seed=1)}
    options["recover_cross_entropy"] = 1.0
    task = tiny_task(tmp_path, student=student, teacher=teacher, options=options, **texts)
    record = train(task)
    for name, weight in projections(student).items():
        assert bool((weight == 0)[before[name] == 0].all()), name
        assert not torch.equal(weight, before[name]), name
        assert int((weight.view(-1, 4) == 0).sum(dim=1).min()) >= 2, name
    assert record.held_out_after < record.held_out_before
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert record.held_out_after == pytest.approx(record.curve[-1].held_out, abs=tolerance)
    zeros = sum(int((weight == 0).sum()) for weight in before.values())
    assert f"all {zeros:,} zeros of the sparse weights are kept" in record.notes


def test_the_gradient_of_a_masked_update():
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64)
    weight[torch.rand(7, 5) < 0.5] = 0.0
    x, a, b = (torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 5), (2, 5), (7, 2)))
    bias = torch.randn(7, dtype=torch.float64)
    for tensor in (x, a, b):
        tensor.requires_grad_(True)

    def function(x, a, b):
        return _MaskedUpdate.apply(x, weight, bias, a, b, 0.7)

    expected = linear(x, weight + 0.7 * (weight != 0) * (b @ a), bias)
    torch.testing.assert_close(function(x, a, b), expected)
    assert torch.autograd.gradcheck(function, (x, a, b))


def test_which_models_are_sparse():
    dense = parent()
    assert find_zeros(dense, parent()) is None
    # zeros that the parent has, too, were not pruned
    assert find_zeros(two_of_four(parent()), two_of_four(parent())) is None
    # units and weights removed: widths differ, zeros remain
    both = two_of_four(pruned(parent()))
    found = find_zeros(both, parent())
    assert found is not None
    assert found.count == sum(int((w == 0).sum()) for w in projections(both).values())
    # a few zeros are chance
    few = parent()
    few.get_submodule("model.layers.0.mlp.up_proj").weight.data[0, :5] = 0
    assert find_zeros(few, parent()) is None


def test_norms_of_a_sparse_model(tmp_path):
    task = tiny_task(
        tmp_path,
        student=two_of_four(parent()),
        text=tiny_text(4, seed=1),
        held_out=text_of(parent(), 2, seed=1),
        options={"recover_weights": "norms", "recover_tokens": 4 * LENGTH},
    )
    before = projections(task.student)
    train(task)
    assert all(torch.equal(w, before[n]) for n, w in projections(task.student).items())
