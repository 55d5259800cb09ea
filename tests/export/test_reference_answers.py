"""How an engine's answers are compared with the pruned model's."""

from __future__ import annotations

import pytest
import torch

from bonsai_fast.export.reference_answers import NUM_COMPARED, Reference, compare

VOCABULARY = 40


@pytest.fixture
def reference() -> Reference:
    """Two prompts, three greedy tokens each; the distributions are random."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, VOCABULARY, generator=generator).mul_(3)
    logprobs = logits.log_softmax(-1)
    greedy = tuple(tuple(row) for row in logprobs.argmax(-1).tolist())
    return Reference(("a", "b"), ((1, 2), (3,)), greedy, tuple(logprobs))


def answers(reference: Reference, count: int = VOCABULARY, shift: float = 0.0) -> list:
    """What an engine would say that lists `count` tokens and is off by `shift`."""
    found = []
    for row in torch.cat(reference.logprobs) + shift:
        likely = row.topk(count)
        found.append(list(zip(likely.indices.tolist(), likely.values.tolist(), strict=True)))
    return found


def test_prefixes_walk_along_the_continuation(reference: Reference) -> None:
    first, second, _ = reference.greedy[0]
    assert reference.prefixes()[:3] == [[1, 2], [1, 2, first], [1, 2, first, second]]
    assert len(reference.prefixes()) == 6 and reference.prefixes()[3] == [3]
    assert reference.vocab_size == VOCABULARY


def test_equal_answers(reference: Reference) -> None:
    found = compare("engine", reference, answers(reference, count=NUM_COMPARED))
    assert found.max_logprob_difference < 1e-6
    assert (found.greedy_equal, found.greedy_tokens, found.distributions) == (6, 6, 6)


def test_shifted_answers(reference: Reference) -> None:
    found = compare("engine", reference, answers(reference, shift=-0.25))
    assert found.mean_logprob_difference == pytest.approx(0.25, rel=1e-4)
    assert found.max_logprob_difference == pytest.approx(0.25, rel=1e-4)


def test_tokens_that_are_not_listed_count_as_the_last_that_is(reference: Reference) -> None:
    found = compare("engine", reference, answers(reference, count=1))
    # they are no likelier than the one that is listed: nothing is known against them
    assert found.max_logprob_difference < 1e-6
    missing = [row[3:] for row in answers(reference)]  # an engine that never says the best three
    lost = compare("engine", reference, missing)
    assert lost.greedy_equal == 0 and lost.max_logprob_difference > 1


def test_nan_is_infinitely_far(reference: Reference) -> None:
    broken = answers(reference)
    broken[2][0] = (broken[2][0][0], float("nan"))
    found = compare("engine", reference, broken)
    assert found.mean_logprob_difference == float("inf")
