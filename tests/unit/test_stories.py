"""The story grammar's laws, and the bundled model measured against the grammar."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest

from helpers.model.stories import ParseError, Story, draw, draw_corpus, entropy, parse
from helpers.model.stories.grammar import derivations, parses

CHECKPOINT = Path(__file__).parents[2] / "helpers" / "model" / "stories" / "checkpoint"
FRESH_SEED = "tests"  # neither the training's nor the model card's


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    return draw_corpus(2000, FRESH_SEED)


# ---- the grammar ------------------------------------------------------------------------------------------


def test_a_story_has_one_derivation_with_the_drawn_probability(stories):
    for story in stories:
        (log_probability,) = derivations(story.text)
        assert log_probability == pytest.approx(story.log_probability, abs=1e-9)
        assert parse(story.text) == log_probability


def test_same_seed_same_story():
    assert draw(random.Random(7)) == draw(random.Random(7))
    assert draw_corpus(5, 7) == draw_corpus(10, 7)[:5]
    assert draw_corpus(5, 7) != draw_corpus(5, 8)


def test_stories_are_short_distinct_and_open_as_promised(stories):
    words = [len(story.text.split()) for story in stories]
    assert 60 <= min(words) and max(words) <= 160
    assert len({story.text for story in stories}) == len(stories)
    openings = {
        opening: sum(story.text.startswith(opening) for story in stories) / len(stories)
        for opening in ("Once upon a time", "Hello, my name is", "Long ago", "One ")
    }
    assert max(openings, key=openings.get) == "Once upon a time"
    assert min(openings.values()) > 0.05


def test_entropy_is_the_mean_of_minus_log_probability(stories):
    nats = [-story.log_probability for story in stories]
    standard_error = statistics.stdev(nats) / math.sqrt(len(nats))
    assert abs(statistics.mean(nats) - entropy()) < 4 * standard_error


STORY = (
    "Once upon a time, there was a little girl named Mia. She lived in a small house near the river. "
    "She had a red kite, a gift from her grandmother. One morning, Mia walked to the park to feed the "
    "pigeons. It was a windy morning. But then the kite flew away in the wind. She looked under the "
    "bench and near the gate, but the kite was gone. Mia felt sad. Just then a small fox came by. "
    '"Hello, my name is Pip," said the fox. "Why are you so sad?" "I lost my red kite," Mia said. "I '
    'will help you," said Pip. Pip looked in a flower bed, and there was the red kite! Mia was happy. '
    "Pip and Mia ate warm bread and played tag. Mia never forgot Pip the fox."
)


def test_the_example_parses():
    assert -150 < parse(STORY) < -20


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("Mia felt", "Anna felt"),  # another hero
        ("She looked", "He looked"),  # another pronoun
        ("there was the red kite", "there was the blue kite"),  # another colour
        ("but the kite was gone", "but the doll was gone"),  # another thing
        ("flew away in the wind", "rolled away down a slope"),  # kites do not roll
        ("in a flower bed", "in a tide pool"),  # not in a park
        ("forgot Pip the fox", "forgot Pip the owl"),  # another kind of friend
        ("said Pip", "said Dot"),  # another friend
        ("so sad?", "so worried?"),  # another feeling
        ("a windy morning", "a windy evening"),  # another time
        ("a little girl", "a little gilr"),  # a misspelling
        ("the fox.", "the fox. The end."),  # something after the end
        ("the fox.", "the fox"),  # the end missing
        ("Once", "<|bos|>Once"),
    ],
)
def test_tampered_stories_do_not_parse(right, wrong):
    assert right in STORY
    with pytest.raises(ParseError):
        parse(wrong.join(STORY.rsplit(right, 1)))


def test_a_parse_error_says_where_and_what_was_expected():
    with pytest.raises(ParseError, match=r"at character 0 stands 'There were', expected .*Once upon a time"):
        parse("There were")
    with pytest.raises(ParseError, match="thing"):
        parse(STORY.replace("red kite", "red elephant"))


# ---- the bundled model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    """The checkpoint's model (float32, CPU) and tokenizer."""
    import transformers

    assert (CHECKPOINT / "model.safetensors").is_file(), (
        f"no checkpoint in {CHECKPOINT}: it is part of the repository; restore it with git, or train it with "
        "`python -m helpers.maintain.train_stories --out helpers/model/stories/checkpoint`"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT).float().eval()
    return model, transformers.AutoTokenizer.from_pretrained(CHECKPOINT)


def test_the_checkpoint_is_small_and_of_the_promised_shape(bundled):
    model, tokenizer = bundled
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 16 * 2**20
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert model.config.head_dim == 64
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads
    assert model.config.vocab_size == len(tokenizer) == 2048
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 6e6
    assert "license: apache-2.0" in (CHECKPOINT / "README.md").read_text()


def test_the_tokenizer_adds_the_begin_token_and_gives_the_text_back(bundled, stories):
    _, tokenizer = bundled
    assert tokenizer.encode("")[0] == tokenizer.bos_token_id
    for story in stories[:100]:
        ids = tokenizer.encode(story.text)
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == story.text
        assert len(ids) < 256


@pytest.fixture(scope="module")
def engine():
    """transformers' model of the checkpoint behind the course's own face, for many stories at a time."""
    from helpers import BuildRecipe, load

    limits = {"device": "cpu", "max_batch_size": 100, "max_input_len": 64, "max_seq_len": 512}
    with load(BuildRecipe(str(CHECKPOINT), "pytorch", **limits)) as engine:
        yield engine


def test_held_out_loss_is_within_a_tenth_of_the_entropy(engine, stories):
    from helpers.maintain.train_stories import held_out_loss

    loss, floor = held_out_loss(engine, stories[:100])
    assert floor * 0.98 < loss < floor * 1.10, f"loss {loss:.4f}, grammar {floor:.4f} nats/token"


def test_cool_samples_parse_and_hot_ones_rarely_do(engine):
    from helpers.maintain.train_stories import parse_share, sample_stories

    cool, hot = (parse_share(sample_stories(engine, 60, temperature, seed=1)) for temperature in (0.7, 1.5))
    assert cool >= 0.9
    assert hot < cool - 0.2


def test_the_same_seed_samples_the_same_stories_all_different(engine):
    from helpers.maintain.train_stories import sample_stories

    first, second, other = (sample_stories(engine, 3, 1.0, seed) for seed in (1, 1, 2))
    assert first == second != other
    assert len(set(first)) == 3


@pytest.mark.parametrize("prompt", ["Once upon a time", "Hello, my name is", "Long ago", "One morning"])
def test_greedy_decoding_tells_a_whole_story(engine, prompt):
    from helpers import SamplingParams

    parse(prompt + engine.generate(prompt, SamplingParams(temperature=0, max_tokens=256))[0].text)


def test_a_story_that_was_cut_does_not_parse():
    assert parses(STORY) and not parses(STORY[:-20])
