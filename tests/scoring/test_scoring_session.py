"""A session: one text, chunks of sub-models, the same scores as in one call."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from scoring_cases import related_masks
from surgery_cases import tokens

from bonsai_fast.scoring import MaskScorer, ScoringSession


def session_of(engine: str, monkeypatch: pytest.MonkeyPatch) -> tuple[MaskScorer, ScoringSession]:
    scorer = MaskScorer(FAMILIES["llama3"](), engine=engine)
    session = scorer.session(tokens(3))
    assert session.submodels_per_chunk > 4
    monkeypatch.setattr(session, "submodels_per_chunk", 4)
    return scorer, session


@pytest.mark.parametrize("engine", ["fused", "hooks"])
def test_chunks_score_as_one_call_does(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, session = session_of(engine, monkeypatch)
    keep = related_masks(scorer.layout)[:9]
    chunks = session.chunks(keep)
    assert [len(chunk.keep) for chunk in chunks] == [4, 4, 1]
    assert torch.equal(torch.cat([chunk.keep for chunk in chunks]), keep)
    losses = torch.cat([chunk.losses() for chunk in chunks])
    assert losses.shape == (9, 3) and losses.std() > 0
    torch.testing.assert_close(losses, scorer.score(keep, tokens(3)), rtol=0, atol=1e-5)
    divergence = torch.cat([chunk.divergence() for chunk in chunks])
    expected = scorer.divergence(keep, tokens(3))
    torch.testing.assert_close(divergence, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["fused", "hooks"])
def test_the_parent_runs_once_for_all_divergences(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, session = session_of(engine, monkeypatch)
    calls = []
    reference = scorer.engine.parent_reference
    monkeypatch.setattr(
        scorer.engine, "parent_reference", lambda text: calls.append(text) or reference(text)
    )
    for chunk in session.chunks(related_masks(scorer.layout)[:9]):
        chunk.losses()
    assert not calls, "losses need no parent"
    for _ in range(2):
        for chunk in session.chunks(related_masks(scorer.layout)[:9]):
            chunk.divergence()
    assert len(calls) == 1


def test_progress_counts_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, session = session_of("fused", monkeypatch)
    done: list[int] = []
    session.whole(related_masks(scorer.layout)).losses(done.append)
    assert sum(done) == 3 * len(related_masks(scorer.layout))


def test_bad_input_is_refused_before_anything_is_scored() -> None:
    scorer = MaskScorer(FAMILIES["llama3"]())
    with pytest.raises(TypeError, match="input_ids: expected dtype int64"):
        scorer.session(tokens().int())
    with pytest.raises(ValueError, match=r"expected shape \[S, P\]"):
        scorer.session(tokens()).chunks(torch.ones(len(scorer.layout), dtype=torch.bool))
