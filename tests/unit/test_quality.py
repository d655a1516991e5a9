"""Scores of an engine on a text: transformers' own, and the laws that they obey."""

from dataclasses import replace

import pytest
import torch
from conftest import Scripted

from helpers import BuildRecipe, load
from helpers.bench import quality, records
from helpers.errors import InputError, LimitError, NumericsError

RECIPE = BuildRecipe(backend="pytorch", device="cpu", max_batch_size=4, max_input_len=64, max_seq_len=256)
TEXT = [
    "Once upon a time, there was a little girl named Mia. She lived in a small house.",
    "Long ago",
    "One morning, Leo walked to the park to feed the pigeons. But then the kite flew away in the wind.",
]


@pytest.fixture(scope="module")
def engine():
    with load(RECIPE) as engine:
        yield engine


@pytest.fixture(scope="module")
def exact(engine):
    return quality.score(engine, TEXT, quiet=True)


@pytest.fixture(scope="module")
def bf16():
    with load(RECIPE.replace(precision="bf16")) as engine:
        yield quality.score(engine, TEXT, quiet=True)


def test_scores_are_transformers_own(exact, stories_reference):
    model, tokenizer = stories_reference
    expected, targets = [], []
    for text in TEXT:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            expected.append(model(ids).logits[0, :-1].log_softmax(-1))
        targets.append(ids[0, 1:])
    assert torch.equal(exact.targets, torch.cat(targets))
    torch.testing.assert_close(exact.log_probs, torch.cat(expected), atol=1e-3, rtol=1e-4)
    loss = torch.nn.functional.nll_loss(torch.cat(expected), torch.cat(targets)).item()
    assert exact.loss == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_how_many_passages_are_read_together_changes_nothing(exact, size):
    with load(RECIPE.replace(max_batch_size=size)) as engine:
        alone = quality.score(engine, TEXT, quiet=True)
    torch.testing.assert_close(alone.log_probs, exact.log_probs, atol=1e-3, rtol=1e-4)


def test_an_engine_beside_itself(exact):
    assert exact.change(exact) == (0, 0)
    assert exact.greedy_kept(exact) == 1
    assert exact.kl(exact) == 0


def test_rounding_moves_the_distribution_a_little(exact, bf16):
    assert 0 < bf16.kl(exact) < 0.01
    assert 0.9 < bf16.greedy_kept(exact) <= 1
    change, margin = bf16.change(exact)
    assert change == pytest.approx(bf16.loss - exact.loss, abs=1e-6) and 0 < margin < 0.05


def test_kl_is_torchs_and_never_below_zero(exact, bf16):
    for one, other in ((exact, bf16), (bf16, exact)):
        expected = torch.nn.functional.kl_div(
            one.log_probs.double(), other.log_probs.double(), log_target=True, reduction="batchmean"
        )
        assert one.kl(other) == pytest.approx(expected.item(), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = (
            quality.Scores(exact.targets[:5], torch.randn(5, 50, generator=generator).log_softmax(-1)) for _ in "ab"
        )
        assert a.kl(b) > 0


def test_a_weight_that_is_wrong_raises_the_loss(exact):
    with load(RECIPE) as engine:
        engine.model.model.layers[0].self_attn.o_proj.weight.data.mul_(4)
        damaged = quality.score(engine, TEXT, quiet=True)
    change, margin = damaged.change(exact)
    assert change > margin > 0
    assert damaged.kl(exact) > 0.01 and damaged.greedy_kept(exact) < 1


def test_token_ids_are_passages_too(engine, exact):
    ids = [engine.tokenize(text) for text in TEXT]
    assert torch.equal(quality.score(engine, ids, quiet=True).targets, exact.targets)


def test_scores_of_other_texts_are_not_compared(engine, exact):
    for text in (TEXT[:1], [*TEXT[:2], TEXT[2].replace("Leo", "Ben")]):
        with pytest.raises(InputError, match="different tokens"):
            quality.score(engine, text, quiet=True).kl(exact)


def test_what_cannot_be_scored_is_refused(engine):
    for passages in ([], [[5]]):
        with pytest.raises(InputError, match="nothing to score"):
            quality.score(engine, passages, quiet=True)
    with pytest.raises(LimitError, match="257 tokens"):
        quality.score(engine, [[5] * 257], quiet=True)
    assert len(quality.score(engine, [[5] * 256], quiet=True).targets) == 255


def test_one_text_is_one_passage(engine, exact):
    alone = quality.score(engine, TEXT[0], quiet=True)
    assert torch.equal(alone.targets, exact.targets[: len(alone.targets)]) and len(alone.targets) > 5


@pytest.mark.parametrize("passages", [{"a": "The cat", "b": "sat"}, b"The cat", None, 5, {"The cat"}], ids=repr)
def test_what_only_looks_like_passages_is_refused(engine, passages):
    with pytest.raises(InputError):
        quality.score(engine, passages, quiet=True)


def test_logits_that_are_no_numbers_have_no_loss():
    engine = Scripted([5])
    engine._prefill = lambda prompts: torch.full((len(prompts), 2048), float("nan"))
    with pytest.raises(NumericsError):
        quality.score(engine, [[5, 6]], quiet=True)


def test_it_can_be_interrupted(engine, exact, monkeypatch):
    steps = iter(range(1000))

    def decode(tokens, whole=engine._decode):
        if next(steps) == 5:
            raise KeyboardInterrupt
        return whole(tokens)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "_decode", decode)
        quality.score(engine, TEXT)
    assert quality.score(engine, TEXT[:1], quiet=True).loss > 0


def test_the_text_of_the_course_fits_any_of_its_engines(engine):
    lengths = [len(engine.tokenize(passage)) for passage in quality.evaluation_text()]
    assert len(lengths) == 8 and max(lengths) <= RECIPE.max_seq_len


# ---- side by side -----------------------------------------------------------------------------------------


def points(*values):
    """Contenders with these (TPOT, size, loss)."""
    return [quality.Precision(f"p{i}", size, tpot, loss, 0, 0.01, 1, 0) for i, (tpot, size, loss) in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([(3, 0, 1.0), (2, 0, 1.1), (1, 0, 1.2)], ["p2", "p1", "p0"]),
        ([(3, 0, 1.0), (2, 0, 1.1), (2.5, 0, 1.2)], ["p1", "p0"]),  # slower and worse
        ([(3, 0, 1.0), (2, 0, 1.0)], ["p1"]),  # as good, and faster
        ([(2, 0, 1.0), (2, 0, 1.0)], ["p0", "p1"]),  # equal in both: neither beats the other
    ],
)
def test_the_front_is_what_nobody_beats(values, expected):
    assert [p.name for p in quality.front(points(*values))] == expected


def test_scores_are_the_same_whatever_torchs_default_device_is(tiny_llama):
    recipe = BuildRecipe(str(tiny_llama), backend="pytorch", device="cpu", max_input_len=16, max_seq_len=32)
    with load(recipe) as engine:
        plain = quality.score(engine, [[1, 2, 3]], quiet=True)
        torch.set_default_device("meta")
        try:
            changed = quality.score(engine, [[1, 2, 3]], quiet=True)
        finally:
            torch.set_default_device(None)
    assert changed.loss == plain.loss and changed.change(plain) == (0, 0)


def test_nothing_to_draw_and_a_cost_that_is_none_are_refused():
    with pytest.raises(InputError, match="nothing to draw"):
        quality.pareto([])
    with pytest.raises(InputError, match="no cost 'price'") as refused:
        quality.front(points((1, 2e6, 1.2)), "price")
    assert "TPOT" in refused.value.fix


def test_scores_in_the_place_of_results_and_an_engines_folder_in_that_of_scores_are_refused(exact, tmp_path):
    for scores in ({"aot fp32": exact}, [exact]):
        for call in (quality.front, quality.pareto, lambda given: quality.table(given, 1)):
            with pytest.raises(InputError, match="Precision is asked for, not"):
                call(scores)
    record = records.read(records.REFERENCES / "cpu-stories.json")
    with pytest.raises(InputError, match="Scores is asked for, not"):
        quality.compare(record, {"aot int8": exact, "aot fp32": tmp_path})


def test_the_picture_says_in_words_what_is_on_the_front():
    picture = quality.pareto(points((3, 4e6, 1.0), (2, 5e6, 1.1), (1, 2e6, 1.2)))
    assert picture.png().startswith(b"\x89PNG")
    assert "front of loss and TPOT: p2, p1, p0" in picture.alt
    assert "front of loss and size: p2, p0" in picture.alt


@pytest.mark.parametrize(
    ("change", "words"),
    [(0.02, "0.0200 nats more, more than chance"), (-0.02, "0.0200 nats less"), (0.005, "no change"), (0, "no change")],
)
def test_a_change_within_chance_is_no_verdict(change, words):
    result = replace(points((1, 1, 1))[0], change=change)
    assert result.verdict.startswith(words)
    assert words in str(quality.table([result], 100))


def test_a_single_token_is_no_verdict(exact, bf16):
    one, other = (quality.Scores(scores.targets[:1], scores.log_probs[:1]) for scores in (exact, bf16))
    change, margin = other.change(one)
    assert change and quality.Precision("p", 1, 1.0, 1.0, change, margin, 1.0, 0.0).verdict.startswith("no change")


def test_size_and_speed_come_from_the_record(exact, bf16):
    record = records.read(records.REFERENCES / "cpu-stories.json")
    scores = {"aot fp32": exact, "aot int8": bf16}
    first, second = quality.compare(record, scores)
    assert (first.change, first.margin, first.kl, first.greedy_kept) == (0, 0, 0, 1)
    row = record.row("aot int8")
    assert (second.disk_bytes, second.tpot_s) == (row.disk_bytes, row.median("tpot_s"))
    with pytest.raises(InputError, match="reference"):
        quality.compare(record, {"aot int8": bf16})
