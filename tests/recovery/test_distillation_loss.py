"""The loss in chunks against plain autograd over all logits."""

import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from bonsai_fast.recovery.distill import distillation_loss
from bonsai_fast.recovery.distill.distillation_loss import DistillationLoss, LogitHead, LossTerms
from bonsai_fast.scoring import SequenceNLL

N, D, V = 37, 11, 53
TERMS = {
    "kl": LossTerms(kl=1.0),
    "reverse": LossTerms(reverse_kl=0.7),
    "cross-entropy": LossTerms(cross_entropy=1.3),
    "hidden": LossTerms(hidden=0.4),
    "all": LossTerms(kl=0.5, reverse_kl=0.3, cross_entropy=0.2, hidden=0.1),
}


def naive(loss: DistillationLoss, hidden: Tensor, parent: Tensor, labels: Tensor) -> Tensor:
    """The same, with all logits."""

    def log_probabilities(head: LogitHead, states: Tensor) -> Tensor:
        logits = states @ head.weight.T
        if head.bias is not None:
            logits = logits + head.bias
        logits = logits * head.scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        return logits.log_softmax(dim=-1)

    log_q, log_p = log_probabilities(loss.student, hidden), log_probabilities(loss.parent, parent)
    total = hidden.new_zeros(())
    for n, label in enumerate(labels.tolist()):
        if label == -100:
            continue
        p, q = log_p[n].exp(), log_q[n].exp()
        total = total + loss.terms.kl * (p * (log_p[n] - log_q[n])).sum()
        total = total + loss.terms.reverse_kl * (q * (log_q[n] - log_p[n])).sum()
        total = total - loss.terms.cross_entropy * log_q[n, label]
        distance = (hidden[n] - parent[n]).square().sum() / parent[n].square().sum()
        total = total + loss.terms.hidden * distance
    return total


def case(terms: LossTerms, dtype: torch.dtype, *, softcap: float | None, scale: float, bias: bool):
    """A loss with heads of both models, states, and labels of which some do not count."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def head() -> LogitHead:
        return LogitHead(random(V, D), random(V) if bias else None, scale, softcap, dtype)

    loss = DistillationLoss(head(), head().frozen(torch.device("cpu")), terms, chunk_bytes=1)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = -100
    return loss, random(N, D), random(N, D), labels


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("softcap, scale, bias", [(None, 1.0, False), (2.5, 0.6, True)])
def test_values_and_gradients_are_those_of_autograd(name, dtype, tolerance, softcap, scale, bias):
    loss, hidden, parent, labels = case(TERMS[name], dtype, softcap=softcap, scale=scale, bias=bias)
    leaves = [hidden, loss.student.weight, *([loss.student.bias] if bias else [])]
    for leaf in leaves:
        leaf.requires_grad_(True)
    results = []
    for function in (loss, lambda *arguments: naive(loss, *arguments)):
        value = function(hidden, parent, labels)
        (3 * value).backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
    for found, expected in zip(*results, strict=True):
        expected = torch.zeros_like(found) if expected is None else expected
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_no_more_rows_of_logits_than_a_chunk(monkeypatch):
    loss, hidden, parent, labels = case(
        TERMS["all"], torch.float32, softcap=None, scale=1.0, bias=False
    )
    shapes = []
    of_logits = distillation_loss._of_logits
    monkeypatch.setattr(
        distillation_loss,
        "_of_logits",
        lambda logits, *rest: shapes.append(logits.shape) or of_logits(logits, *rest),
    )
    loss(hidden.requires_grad_(True), parent, labels)
    counted = int((labels != -100).sum())
    assert shapes == [(16, V), (counted - 16, V)]


def test_no_token_counts():
    loss, hidden, parent, labels = case(
        TERMS["all"], torch.float32, softcap=None, scale=1.0, bias=False
    )
    value = loss(hidden.requires_grad_(True), parent, torch.full_like(labels, -100))
    value.backward()
    assert float(value.detach()) == 0 and not bool(hidden.grad.any())


def test_bfloat16_heads_give_the_loss_of_their_rounded_logits():
    loss, hidden, parent, labels = case(
        TERMS["kl"], torch.bfloat16, softcap=None, scale=1.0, bias=False
    )
    counted = labels != -100
    log_q = (hidden @ loss.student.weight.T).float().log_softmax(dim=-1)[counted]
    log_p = (parent @ loss.parent.weight.T).float().log_softmax(dim=-1)[counted]
    expected = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(loss(hidden, parent, labels), expected, rtol=1e-5, atol=1e-5)


def test_heads_of_real_models_give_their_logits():
    """Gemma 2 caps its logits, Cohere scales them."""
    common = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    gemma2 = Gemma2ForCausalLM(
        Gemma2Config(**common, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager")
    )
    cohere = CohereForCausalLM(CohereConfig(**common, logit_scale=0.5))
    input_ids = torch.arange(12).view(2, 6)
    for model in (gemma2.eval(), cohere.eval()):
        nll = SequenceNLL(model)
        head = LogitHead.of(nll)
        with torch.no_grad():
            found = head.logits(nll.states(input_ids), head.weight)
            torch.testing.assert_close(found, model(input_ids=input_ids).logits)
