"""The training that papers publish, on tiny models and fewer tokens."""

import pytest
import torch
from families import FAMILIES
from training_cases import LENGTH, parent, pruned, text_of, tiny_task, tiny_text, train

from bonsai_fast.config.recover_options import RecoverOptions
from bonsai_fast.recovery import TextWanted
from bonsai_fast.recovery.distill import DistillTier
from bonsai_fast.recovery.distill.distillation_loss import LossTerms
from bonsai_fast.recovery.distill.recipe import Recipe
from bonsai_fast.recovery.distill.recipe_choice import recipe_of


def recipe(tier, length=512, model_type="llama", **options) -> Recipe:
    return recipe_of(tier, RecoverOptions(**options), model_type=model_type, length=length)


def test_as_published():
    bonsai = recipe("bonsai")
    assert (bonsai.rank, bonsai.rank * bonsai.scale, bonsai.dropout) == (128, 512, 0.05)
    assert (bonsai.learning_rate, bonsai.batch, bonsai.warmup_steps) == (1e-4, 128, 5)
    assert bonsai.tokens == 15_000 * 512 and bonsai.head
    wanda, pg, mini = recipe("wanda-lora"), recipe("policy-gradient"), recipe("mini-llm")
    assert (wanda.rank, wanda.adapted) == (8, "query and value projections")
    assert (pg.rank, pg.rank * pg.scale) == (16, 10)
    assert (mini.rank, mini.rank * mini.scale, mini.adapted) == (8, 16, "all linear layers")
    for published in (wanda, pg, mini):
        assert published.terms == LossTerms(cross_entropy=1.0)


def test_two_meanings_of_lambda():
    """In the code it weighs the sum over a sequence's tokens; the paper turns the divergence."""
    assert recipe("bonsai").terms == LossTerms(cross_entropy=1.0, kl=5.12)
    assert recipe("bonsai", length=128).terms.kl == pytest.approx(1.28)
    paper = recipe("bonsai", recover_kl="paper")
    assert paper.terms == LossTerms(cross_entropy=1.0, reverse_kl=0.01)


def test_phi_is_trained_whole():
    whole = recipe("bonsai", model_type="phi", length=2048)
    assert whole.weights == "all" and whole.tokens == 100_000 * 2048


def test_fewer_tokens_are_as_many_steps():
    published, fewer = recipe("bonsai"), recipe("bonsai", recover_tokens=15_000 * 512 // 16)
    assert published.tokens / published.batch == fewer.tokens / fewer.batch
    few = recipe("mini-llm", recover_tokens=512 * 80)
    assert (few.batch, few.warmup_steps) == (1, 8)


def test_the_text_that_is_wanted():
    texts = {tier: DistillTier(tier).text(RecoverOptions()) for tier in ("distill", "mini-llm")}
    assert texts["distill"] == TextWanted(tokens=40_960, length=512)
    assert texts["mini-llm"] == TextWanted(tokens=50_000 * 256, length=256)  # read twice
    asked = DistillTier("wanda-lora").text(RecoverOptions(recover_tokens=5000))
    assert asked == TextWanted(tokens=5000, length=1024)


def test_a_short_text_is_read_as_often_as_the_paper_does(tmp_path):
    options = {"recover_tokens": None}
    for tier, epochs in (("wanda-lora", 1), ("mini-llm", 2)):
        task = tiny_task(tmp_path, options=options, text=tiny_text(3, seed=1))
        assert DistillTier(tier).plan(task).tokens == epochs * 3 * LENGTH


def test_the_learning_rate_rises_and_falls():
    for schedule in ("cosine", "linear"):
        plan = Recipe(
            name="distill",
            weights="all",
            terms=LossTerms(kl=1.0),
            learning_rate=2.0,
            schedule=schedule,
            tokens=100,
        )
        rates = [plan.rate(step, step / 100) for step in range(100)]
        top = rates.index(max(rates))
        assert top == plan.warmup_steps and rates[top] > 1.8
        assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:])[::-1]
        assert rates[-1] < 0.05 and plan.rate(100, 1.0) == 0.0


@pytest.mark.parametrize("tier", ["bonsai", "wanda-lora", "mini-llm", "policy-gradient"])
def test_tiny_runs(tmp_path, tier):
    task = tiny_task(tmp_path, options={"recover_tokens": 6 * LENGTH})
    names = ("q_proj", "v_proj") if tier in ("wanda-lora", "policy-gradient") else ("_proj",)
    before = {name: x.detach().clone() for name, x in task.student.named_parameters()}
    record = train(task, tier)
    changed = {n for n, x in task.student.named_parameters() if not torch.equal(x, before[n])}
    assert changed and all(any(name in full for name in names) for full in changed)
    notes = " ".join(record.notes)
    assert f"trained on {6 * LENGTH} tokens in batches of 1; the paper on" in notes
    assert ("tied to the embeddings and stays frozen" in notes) == (tier == "bonsai")
    needs_parent = tier == "bonsai"
    assert record.settings["teacher"] == ("live" if needs_parent else "not used")


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_bonsai_trains_an_untied_head(tmp_path, family):
    teacher, student = FAMILIES[family](), pruned(FAMILIES[family]())
    text = text_of(teacher, 4, seed=1, length=9)
    before = {name: x.detach().clone() for name, x in student.named_parameters()}
    task = tiny_task(
        tmp_path,
        student=student,
        teacher=teacher,
        text=text,
        held_out=text,
        options={"recover_tokens": 8 * 9},
    )
    record = train(task, "bonsai")
    assert record.settings["head"] == "trained"
    same = {name for name, x in student.named_parameters() if torch.equal(x, before[name])}
    if family == "phi":
        assert same == {"model.embed_tokens.weight"}
    else:
        assert "lm_head.weight" not in same and "model.embed_tokens.weight" in same
    assert record.held_out_after < record.held_out_before


def test_a_tied_model_keeps_its_embeddings(tmp_path):
    task = tiny_task(tmp_path, student=pruned(parent()), options={"recover_tokens": 2 * LENGTH})
    before = task.student.get_input_embeddings().weight.detach().clone()
    assert train(task, "bonsai").settings["head"] == "frozen"
    head, embeddings = (
        task.student.get_output_embeddings(),
        task.student.get_input_embeddings(),
    )
    assert head.weight is embeddings.weight and torch.equal(head.weight, before)
