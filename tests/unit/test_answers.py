"""Stop strings: where an answer ends, whole or streamed, wherever its tokens end."""

import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor, TimeoutError

import pytest
from conftest import Scripted
from test_tokenizer import KINDS, make, saved

from helpers import BuildRecipe, SamplingParams
from helpers.backends.answers import AnswerText
from helpers.bench import quality
from helpers.errors import InputError
from helpers.model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {kind: load_tokenizer(saved(tmp_path_factory.mktemp(kind), make(kind))) for kind in KINDS}


def before_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    """The law, letter by letter: the text ends when the first stop string is complete, and that is left out."""
    for end in range(1, len(text) + 1):
        if hits := [one for one in stop if text[:end].endswith(one)]:
            return text[: end - max(map(len, hits))], True
    return text, False


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_ends_before_the_first_stop_string_whole_and_streamed(tokenizers, kind):
    tokenizer, rng = tokenizers[kind], random.Random(kind)
    prompt = tokenizer.encode("Once")
    ended = 0
    for _ in range(150):
        text = "".join(rng.choice("the river, a b 你 é \N{PARTY POPPER}.") for _ in range(rng.randrange(1, 12)))
        script = [*tokenizer.encode("Once" + text)[len(prompt) :], 2]
        engine = Scripted(script, (2,), tokenizer)
        sampling = SamplingParams(temperature=0, max_tokens=rng.randrange(1, 20))
        (free,) = engine.generate("Once", sampling)
        starts = [rng.randrange(len(free.text) + 1) for _ in range(rng.randrange(1, 4))]
        stop = [free.text[at : at + rng.randrange(1, 6)] + rng.choice(["", "", "x"]) for at in starts]
        expected, stopped = before_stop(free.text, stop := [one for one in stop if one] or ["?"])
        sampling = SamplingParams(temperature=0, max_tokens=sampling.max_tokens, stop=stop)
        (answer,) = engine.generate("Once", sampling)
        tokens = list(engine.stream("Once", sampling))
        assert answer.text == expected == "".join(token.text for token in tokens)
        assert answer.token_ids == [token.token_id for token in tokens] == free.token_ids[: len(answer.token_ids)]
        assert answer.finish_reason == ("stop" if stopped else free.finish_reason)
        assert stopped or answer.token_ids == free.token_ids
        ended += stopped
        if stopped:  # the last token is the one that made it complete
            shorter = AnswerText(tokenizer, prompt, stop)
            assert not [shorter.add(token) for token in answer.token_ids[:-1]] or not shorter.stopped
    assert ended > 50


def test_of_a_batch_each_answer_ends_by_itself(tokenizers):
    tokenizer = tokenizers["byte-level"]
    script = tokenizer.encode("a river.")[1:]
    engine = Scripted([*script, 2], (2,), tokenizer)
    answers = engine.generate([[1], [1, 5]], SamplingParams(temperature=0, max_tokens=30, stop="iv"))
    assert [answer.text for answer in answers] == ["a r", "a r"]
    answers = engine.generate([[1], [1, 5]], SamplingParams(temperature=0, max_tokens=30, stop=["."]))
    assert [(answer.text, answer.finish_reason) for answer in answers] == [("a river", "stop")] * 2
    (answer,) = engine.generate([[1]], SamplingParams(temperature=0, max_tokens=30, stop="another"))
    assert (answer.text, answer.finish_reason) == ("a river.", "stop")


def test_what_may_be_the_beginning_of_a_stop_string_is_held_back_and_handed_out_when_it_is_none(tokenizers):
    tokenizer = tokenizers["byte-level"]
    pieces = [tokenizer.encode(letter, False)[0] for letter in "abcabd"]
    text = AnswerText(tokenizer, [1], ("abd",))
    assert [text.add(piece) for piece in pieces] == ["", "", "abc", "", "", ""]
    assert text.stopped and text.end() == ""
    text = AnswerText(tokenizer, [1], ("abd", "bc"))
    assert [text.add(piece) for piece in pieces[:3]] == ["", "", "a"] and text.stopped
    text = AnswerText(tokenizer, [1], ("abd",))
    assert [text.add(piece) for piece in pieces[:5]] == ["", "", "abc", "", ""] and text.holds_back
    assert text.end() == "ab" and not text.stopped


def test_a_stop_string_at_the_last_token_is_the_reason(tokenizers):
    tokenizer = tokenizers["byte-level"]
    engine = Scripted(tokenizer.encode("ab", False), (2,), tokenizer)
    count = len(tokenizer.encode("ab", False))
    (answer,) = engine.generate([[1]], SamplingParams(temperature=0, max_tokens=count, stop="b"))
    assert (answer.text, answer.finish_reason) == ("a", "stop")


def test_with_ignore_eos_a_stop_string_ends_an_answer_all_the_same(tokenizers):
    tokenizer = tokenizers["byte-level"]
    script = [2, *tokenizer.encode("a river", False)]
    sampling = SamplingParams(temperature=0, max_tokens=30, stop="r", ignore_eos=True)
    (answer,) = Scripted(script, (2,), tokenizer).generate([[1]], sampling)
    assert answer.text == "a " and answer.token_ids[0] == 2


def test_a_batch_without_stop_strings_is_decoded_once_at_its_end(tokenizers, monkeypatch):
    """Text while an answer grows costs time in every step, which a benchmark would measure."""
    monkeypatch.setattr(AnswerText, "add", lambda *_: pytest.fail("text was made in the loop"))
    engine = Scripted([7, 8, 2], (2,), tokenizers["byte-level"])
    assert len(engine.generate([[1]], SamplingParams(temperature=0))[0].token_ids) == 2


def test_a_model_without_a_tokenizer_takes_no_stop_string():
    engine = Scripted([7])
    engine.tokenizer = None
    for call in (engine.generate, engine.stream):
        with pytest.raises(InputError, match="tokenizer.json") as refused:
            call([1], SamplingParams(stop="a"))
        assert "stop" in refused.value.fix


def test_the_older_interface_refuses_what_it_would_ignore(tmp_path):
    from helpers.backends.tensorrt_llm.backend import model_runner

    recipe = BuildRecipe(backend="tensorrt_llm", precision="bf16", max_input_len=8, max_seq_len=16)
    with pytest.raises(InputError, match="stop"):
        model_runner(recipe, tmp_path, [[1]], SamplingParams(stop="a"))


# ---- who reads a stream -----------------------------------------------------------------------------------


def test_threads_that_read_one_stream_take_turns():
    stream, tokens = Scripted([5]).stream([1], SamplingParams(temperature=0, max_tokens=60)), []
    with ThreadPoolExecutor(4) as pool:
        for reader in [pool.submit(lambda: tokens.extend(stream)) for _ in range(4)]:
            reader.result()
    assert len(tokens) == 60


@pytest.mark.parametrize("use", [next, lambda stream: stream.close()], ids=["reads", "closes"])
def test_a_stream_that_reads_or_closes_itself_is_refused(use):
    stream = Scripted([5]).stream([1], SamplingParams(temperature=0, max_tokens=6), observe=lambda _: use(stream))
    with pytest.raises(InputError, match="observe"):
        list(stream)


def test_a_stream_is_closed_after_the_token_that_another_thread_waits_for():
    begun, go_on = threading.Event(), threading.Event()

    def observe(_):
        begun.set()
        assert go_on.wait(60)

    stream = Scripted([5]).stream([1], SamplingParams(temperature=0, max_tokens=6), observe=observe)
    with ThreadPoolExecutor(2) as pool:
        reader = pool.submit(next, stream)
        assert begun.wait(60)
        closer = pool.submit(stream.close)
        with contextlib.suppress(TimeoutError):  # it waits; the error that it must not raise comes here
            closer.result(0.1)
        go_on.set()
        assert reader.result().token_id == 5 and closer.result() is None
    assert list(stream) == []


def test_an_observer_that_changes_its_logits_changes_no_answer():
    sampling = SamplingParams(temperature=0, max_tokens=6)
    tokens = list(Scripted([5]).stream([1], sampling, observe=lambda logits: logits.fill_(0)))
    assert [token.token_id for token in tokens] == [5] * 6


def test_scores_are_no_request_that_somebody_else_goes_on_with():
    engine = Scripted([5])
    engine.prefill([[1]])
    quality.score(engine, [[1, 2, 3]], quiet=True)
    with pytest.raises(InputError, match="nothing to append"):
        engine.decode([5])
