"""Text to ids and back, for every kind of tokenizer, compared with transformers' own."""

import errno
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import Scripted, limits
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BatchEncoding

from helpers import BuildRecipe, SamplingParams
from helpers.errors import EngineMismatch, InputError, ModelError
from helpers.model.stories import draw_corpus
from helpers.model.tokenizer import IncrementalDetokenizer, load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = [
    "Once upon a time there was a river.",
    "naïve 你好, \N{PARTY POPPER}\N{PARTY POPPER}! Ünïcödé",
    "  two spaces,\ta tab\nand a new line.\n\n",
    "don't , stop .",
    "你好é\N{PARTY POPPER}" * 4,
]


def with_bos(backend):
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def byte_level():
    """As of Llama 3 and Qwen."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return backend, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)


def sentencepiece_bpe(legacy):
    """As of TinyLlama, Llama 2 and Mistral: spaces are written as a letter, other characters as bytes.

    A vocabulary of letters, of three words with the pieces on the way to them, and of all bytes.
    """
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges = []
    for letter in "▁abcdefghijklmnopqrstuvwxyzO.,'!":
        vocab[letter] = len(vocab)
    for word in ("▁Once", "▁upon", "▁there", "▁the", "▁river"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens(SPECIAL)
    return backend, None


def without_a_space_before():
    """As of Gemma: no space is put before a text, so none is taken away."""
    backend, _ = sentencepiece_bpe(legacy=False)
    backend.pre_tokenizer, backend.normalizer = pre_tokenizers.Sequence([]), normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend, None


def unigram():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>")


def word_piece():
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL)


def end_of_word():
    """As of the first GPT: a mark at a word's end, so a space belongs to the token after it."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.BPEDecoder()
    return backend, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>")


KINDS = {
    "byte-level": byte_level,
    "sentencepiece": lambda: sentencepiece_bpe(legacy=False),
    "sentencepiece-legacy": lambda: sentencepiece_bpe(legacy=True),
    "sentencepiece-plain": without_a_space_before,
    "unigram": unigram,
    "word-piece": word_piece,
    "end-of-word": end_of_word,
}
BYTES = ("byte-level", "sentencepiece", "sentencepiece-legacy", "sentencepiece-plain")  # these can write any text


def make(kind):
    backend, trainer = KINDS[kind]()
    if trainer:
        trainer.show_progress = False
        backend.train_from_iterator([*(story.text for story in draw_corpus(40, "tokenizers")), *TEXTS], trainer)
    return with_bos(backend)


def saved(folder, backend, config=None, **others):
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    for name, fields in {"tokenizer_config": {**plain, **(config or {})}, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(tmp_path, kind):
    return saved(tmp_path, make(kind))


@pytest.fixture
def reference(folder):
    return AutoTokenizer.from_pretrained(folder)


def streamed(tokenizer, prompt, answer):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    return "".join([detokenizer.add(token) for token in answer]) + detokenizer.end()


# ---- decoding ---------------------------------------------------------------------------------------------


def test_prompt_and_answer_read_as_transformers_decodes_the_whole_wherever_the_prompt_ends(folder, kind, reference):
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        ids = reference(text).input_ids
        assert tokenizer.encode(text) == ids
        whole = reference.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids) == whole
        for cut in range(1, len(ids)):
            answer = tokenizer.decode(ids[cut:], ids[:cut])
            assert streamed(tokenizer, ids[:cut], ids[cut:]) == answer
            # A character in which the prompt ends comes with the answer.
            assert tokenizer.decode(ids[:cut]).rstrip("\ufffd") + answer == whole


def test_random_texts_between_special_tokens_read_as_transformers_decodes_the_whole(folder, kind, reference):
    tokenizer, rng = load_tokenizer(folder), random.Random(kind)
    compared = 0
    for _ in range(300):
        ids = []
        for _ in range(rng.randrange(1, 4)):
            text = "".join(
                rng.choice("the river Once upon, .\n\té你\N{PARTY POPPER}") for _ in range(rng.randrange(1, 16))
            )
            ids += [*reference(text).input_ids, rng.choice([0, 1, 2])]
        cut = rng.randrange(len(ids) + 1)
        answer = tokenizer.decode(ids[cut:], ids[:cut])
        assert streamed(tokenizer, ids[:cut], ids[cut:]) == answer
        before, whole = (reference.decode(part, skip_special_tokens=True) for part in (ids[:cut], ids))
        if "\ufffd" not in before:  # the prompt does not end inside a character
            assert before + answer == whole
            compared += 1
    assert compared > 150


def test_random_tokens_are_streamed_as_transformers_decodes_them(folder, reference):
    tokenizer, rng = load_tokenizer(folder), random.Random(0)
    compared = 0
    for _ in range(400):
        ids = [rng.randrange(len(reference)) for _ in range(rng.randrange(1, 12))]
        prompt, answer = [1, *ids[: len(ids) // 2]], ids[len(ids) // 2 :]
        text = tokenizer.decode(answer, prompt)
        assert streamed(tokenizer, prompt, answer) == text
        before = reference.decode(prompt, skip_special_tokens=True)
        whole = reference.decode(prompt + answer, skip_special_tokens=True)
        if "\ufffd" not in before + whole:  # these tokens make whole characters
            assert before + text == whole
            compared += 1
    assert compared > 20


def test_a_first_word_keeps_its_space_after_a_prompt_and_after_special_tokens(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, make("sentencepiece")))
    there = tokenizer.encode("there", add_special_tokens=False)
    once = tokenizer.encode("Once")
    assert tokenizer.decode(there, once) == streamed(tokenizer, once, there) == " there"
    assert tokenizer.decode(there, [*once, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1]) == " there"
    assert tokenizer.decode(there, [1]) == tokenizer.decode(there) == "there"
    newline = tokenizer._backend.token_to_id("<0x0A>")  # a prompt of special tokens only, and an answer of bytes first
    assert tokenizer.decode([newline, *there], [1]) == streamed(tokenizer, [1], [newline, *there]) == "\n there"


@pytest.mark.parametrize("kind", BYTES)
def test_a_character_is_given_once_it_is_whole_and_what_there_is_of_it_at_the_end(folder, kind):
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.encode("Once")
    ids = tokenizer.encode("Once\N{PARTY POPPER}\N{PARTY POPPER}")[len(prompt) :]
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) == "\N{PARTY POPPER}" * 2 and "" in pieces and detokenizer.end() == ""
    cut = streamed(tokenizer, prompt, ids[:-1])
    assert cut == tokenizer.decode(ids[:-1], prompt)
    assert cut.rstrip("\ufffd") == "\N{PARTY POPPER}" != cut
    assert tokenizer.decode(ids[-1:], prompt + ids[:-1]) == "\N{PARTY POPPER}"  # a prompt that ends inside a character


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_that_are_no_text_do_not_spoil_what_is_around_them_or_wait_for_ever(folder, kind):
    tokenizer = load_tokenizer(folder)
    broken = tokenizer.encode("\N{PARTY POPPER}", add_special_tokens=False)[-4:-3] * 300
    there = tokenizer.encode("Once there")[len(tokenizer.encode("Once")) :]
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode("Once"))
    assert "".join(map(detokenizer.add, broken)).startswith("\ufffd")
    text = streamed(tokenizer, tokenizer.encode("Once"), [*there, *broken, *there])
    assert text.startswith(" there\ufffd") and text.endswith("\ufffd there")


def test_a_step_decodes_few_tokens_however_long_the_answer_is(folder, monkeypatch):
    tokenizer = load_tokenizer(folder)
    longest = []
    decode = tokenizer.decode_alone
    monkeypatch.setattr(tokenizer, "decode_alone", lambda ids: longest.append(len(ids)) or decode(ids))
    ids = tokenizer.encode(" ".join(TEXTS[:1] * 50))
    streamed(tokenizer, ids, ids)
    assert max(longest) < 16


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"once": 0}, unk_token="[UNK]"),
        models.WordPiece({"once": 0}, unk_token="[UNK]"),
        models.Unigram([(letter, -1.0) for letter in "once"]),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_vocabulary_without_its_unknown_token_is_told_when_a_text_needs_it(tmp_path, model):
    tokenizer = load_tokenizer(saved(tmp_path, Tokenizer(model)))
    assert tokenizer.encode("once")
    with pytest.raises(ModelError, match="cannot read the text") as told:
        tokenizer.encode("zebra")
    assert "unknown token" in told.value.cause


def test_a_panic_of_the_library_is_told_in_words(tmp_path):
    backend = Tokenizer(models.WordLevel({"once": 0}, unk_token="once"))
    content = json.loads(backend.to_str())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path)
    content["normalizer"], sequence = None, {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": "<q>", "type_id": 0}}
    template = {"single": [first, sequence], "pair": [], "special_tokens": {}}
    content["post_processor"] = {"type": "TemplateProcessing", **template}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="cannot read the text"):
        load_tokenizer(tmp_path).encode("once")


def test_a_token_that_the_model_has_no_embedding_for_is_told_of_a_text(tmp_path):
    backend = Tokenizer(models.WordLevel({"once": 0, "[PAD]": 2048}, unk_token="once"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine = Scripted([1], tokenizer=load_tokenizer(saved(tmp_path, backend)))
    assert engine.tokenize("once") == [0]
    with pytest.raises(InputError, match="token 2048") as told:
        engine.tokenize("once [PAD]")
    assert "tokenizer" in told.value.cause and "Tokenize with" not in told.value.fix


def test_without_a_tokenizer_there_is_no_text():
    detokenizer = IncrementalDetokenizer(None, [1, 2])
    assert detokenizer.add(3) == detokenizer.end() == "" and not detokenizer.holds_back


# ---- what the checkpoint's files say ----------------------------------------------------------------------


def entry(content, special=True):
    return {
        "content": content,
        "special": special,
        **dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False),
    }


SIZE = 400  # of the byte-level vocabulary, so the id of the first token that is added
FILES = {
    "added_tokens_decoder": {
        "config": {"added_tokens_decoder": {str(SIZE + 1): entry("<b>", False), str(SIZE): entry("<a>")}}
    },
    "ids of several digits": {
        "config": {"added_tokens_decoder": {"1000": entry("<b>"), str(SIZE): entry("<a>")}},
    },
    "added_tokens.json": {"added_tokens": {"<b>": SIZE + 1, "<a>": SIZE}},
    "names in tokenizer_config.json": {"config": {"pad_token": "<a>", "additional_special_tokens": ["<b>"]}},
    "a named token of the vocabulary": {"config": {"eos_token": "e"}},
    "special_tokens_map.json": {"special_tokens_map": {"pad_token": entry("<a>")}, "added_tokens": {"<b>": SIZE}},
    "extra_special_tokens": {"config": {"extra_special_tokens": {"image_token": "<a>"}}},
    "split_special_tokens": {"config": {"split_special_tokens": True}},
    "no second opinion": {
        "config": {"added_tokens_decoder": {}},
        "added_tokens": {"<a>": SIZE},
        "special_tokens_map": {"pad_token": "<b>"},
    },
    "BOS by tokenizer.json": {"config": {"add_bos_token": False, "add_eos_token": True}},
}


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_tokens_named_beside_tokenizer_json_are_those_of_transformers(tmp_path, files):
    folder = saved(tmp_path, make("byte-level"), **files)
    tokenizer, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "a <a> and <b>e</s> <unk>."
    ids = reference(text).input_ids
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode(text, add_special_tokens=False) == reference(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_tokens_of_added_tokens_json_are_met_in_the_normalized_text_unless_they_are_special(tmp_path):
    backend = make("byte-level")
    backend.normalizer = normalizers.Lowercase()
    files = {"added_tokens": {"<A>": SIZE, "<B>": SIZE + 1}, "special_tokens_map": {"pad_token": "<B>"}}
    folder = saved(tmp_path, backend, **files)
    text = "<a> <A> <b> <B>"
    assert load_tokenizer(folder).encode(text) == AutoTokenizer.from_pretrained(folder)(text).input_ids


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-legacy"])
@pytest.mark.parametrize("flags", [{"special": True, "rstrip": True}, {"special": False}], ids=str)
@pytest.mark.parametrize("files", [{}, {"config": {"eos_token": "<a>"}}, {"special_tokens_map": {"pad_token": "<a>"}}])
@pytest.mark.parametrize("listed", [True, False])
def test_what_tokenizer_json_says_of_a_token_counts_before_added_tokens_json(tmp_path, kind, flags, files, listed):
    """An older save's file may lie beside a newer tokenizer.json."""
    backend = make(kind)
    backend.add_tokens([AddedToken("<a>", normalized=False, **flags)])
    more = {"added_tokens": {"<a>": backend.token_to_id("<a>")}} if listed else {}
    folder = saved(tmp_path, backend, **files, **more)
    ours, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("Once<a> \n there<a>river", " <a>"):
        ids = reference(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


AFTER_SPECIAL = ["hi", "Once upon", " hi", "Once</s> the river", "Once</s>hi"]


@pytest.mark.parametrize("legacy", [False, True, None])
@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-legacy"])
def test_a_llama_tokenizer_cuts_as_its_file_says_as_in_transformers_4(tmp_path, kind, legacy):
    """transformers 5 makes the class anew by `legacy`; where the file was made with the same, nothing differs."""
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "unk_token": "<unk>"}
    folder = saved(tmp_path, make(kind), config)
    ours, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [ours.encode(text) for text in AFTER_SPECIAL] == [alone.encode(text).ids for text in AFTER_SPECIAL]
    differ = [text for text in AFTER_SPECIAL if ours.encode(text) != reference(text).input_ids]
    if transformers.__version__ < "5" or (kind == "sentencepiece" and not legacy):
        assert differ == []
    elif legacy is False:  # as TinyLlama and Llama 2 are published: a space before the text, and after a special token
        assert differ == AFTER_SPECIAL[2:]


@pytest.mark.parametrize("prefix", [False, True, None])
@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-legacy", "sentencepiece-plain", "byte-level"])
def test_a_space_before_the_text_is_refused_where_two_files_contradict_each_other(tmp_path, kind, prefix):
    folder = saved(tmp_path, make(kind), {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": prefix})
    if kind == "byte-level" or prefix in (None, kind != "sentencepiece-plain"):
        load_tokenizer(folder)
    else:
        with pytest.raises(ModelError, match="add_prefix_space"):
            load_tokenizer(folder)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("setting", [{}, {"add_prefix_space": False}, {"add_prefix_space": True}])
@pytest.mark.parametrize("kind", ["GPT2TokenizerFast", "Qwen2Tokenizer"])
def test_a_space_before_a_text_of_bytes_is_refused_where_two_files_contradict_each_other(tmp_path, kind, setting, adds):
    """adds: as tokenizer.json has it. These classes put none where they are not told to."""
    backend = make("byte-level")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds)
    folder = saved(tmp_path, backend, {"tokenizer_class": kind, **setting})
    if adds == setting.get("add_prefix_space", False):
        assert load_tokenizer(folder).encode("Once") == AutoTokenizer.from_pretrained(folder)("Once").input_ids
    else:
        with pytest.raises(ModelError, match="add_prefix_space"):
            load_tokenizer(folder)


@pytest.mark.parametrize(
    "setting",
    [
        lambda backend: backend.enable_truncation(4),
        lambda backend: backend.enable_padding(length=64, pad_id=2, pad_token="</s>", direction="left"),
    ],
    ids=["truncation", "padding"],
)
def test_settings_of_a_training_run_are_switched_off(tmp_path, setting):
    backend = make("byte-level")
    whole = backend.encode(TEXTS[0]).ids
    setting(backend)
    folder = saved(tmp_path, backend)
    assert load_tokenizer(folder).encode(TEXTS[0]) == whole == AutoTokenizer.from_pretrained(folder)(TEXTS[0]).input_ids


def test_a_padding_token_that_a_training_run_left_is_a_token_too(tmp_path):
    """transformers numbers it before those that are declared after it."""
    backend = make("byte-level")
    backend.enable_padding(pad_token="[PAD]")
    folder = saved(tmp_path, backend, {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<mask>"})
    assert load_tokenizer(folder).encode("<mask>") == AutoTokenizer.from_pretrained(folder)("<mask>").input_ids


def test_a_prompt_that_begins_with_bos_gets_no_second_one(folder):
    tokenizer = load_tokenizer(folder)
    plain = tokenizer.encode("Once upon")
    assert plain[0] == 1 and 1 not in plain[1:]
    assert tokenizer.encode("Once upon", add_special_tokens=False) == plain[1:]
    templated = tokenizer.encode("<s>Once upon")
    assert templated.count(1) == 1 and templated == tokenizer.encode("<s>Once upon", add_special_tokens=False)
    assert tokenizer.encode("<s><s>Once").count(1) == 2  # as the user wrote it


def test_an_end_token_that_a_text_doubles_itself_is_kept(tmp_path):
    backend = make("byte-level")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert load_tokenizer(saved(tmp_path, backend)).encode("</s></s>") == [2, 2, 2]


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def newer(path):
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["type"] = "OfNextYear"
    path.write_text(json.dumps(content))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:100])


def latin_1(path):
    path.write_bytes(path.read_bytes() + b"\xe9")


@pytest.mark.parametrize("damage", [pointer, newer, cut_short, latin_1])
def test_a_tokenizer_that_cannot_be_read_is_refused_before_a_build(tmp_path, tiny_llama, damage, monkeypatch):
    import shutil

    from helpers import build
    from helpers.backends.aot import backend

    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    damage(folder / "tokenizer.json")
    monkeypatch.setattr(backend, "build", lambda *arguments: pytest.fail("the build has begun"))
    with pytest.raises(ModelError, match="tokenizer of 'model' cannot be read") as refused:
        build(BuildRecipe(model=str(folder), **limits(max_input_len=16, max_seq_len=48)), quiet=True)
    assert ("git lfs pull" in refused.value.fix) == (damage is pointer)


def test_a_tokenizer_that_the_system_does_not_open_is_not_told_as_damaged(tmp_path, monkeypatch):
    folder, plain = saved(tmp_path, make("byte-level"), {}), Path.open

    def refuse(path, *arguments, **settings):
        if path.name == "tokenizer.json":
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return plain(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match="cannot be opened.*Too many open files") as refused:
        load_tokenizer(folder)
    assert "ulimit" in refused.value.cause


@pytest.mark.parametrize(
    "config",
    [{"added_tokens_decoder": {"x": "<a>"}}, {"added_tokens_decoder": [1]}, {"additional_special_tokens": [7]}],
)
def test_a_tokenizer_config_of_another_form_is_refused(tmp_path, config):
    with pytest.raises(ModelError):
        load_tokenizer(saved(tmp_path, make("byte-level"), config))


def test_every_file_that_decides_the_ids_is_in_the_digest_and_in_the_engines_folder(tmp_path):
    from helpers.model.checkpoint import TOKENIZER_FILES, Checkpoint

    folder = saved(tmp_path, make("byte-level"), special_tokens_map={}, added_tokens={})
    digests = {Checkpoint("x", folder, False).tokenizer_digest()}
    for name in TOKENIZER_FILES:
        path = folder / name
        path.write_text((path.read_text() if path.exists() else "") + " ")
        digests.add(Checkpoint("x", folder, False).tokenizer_digest())
    assert len(digests) == 1 + len(TOKENIZER_FILES) == 6


def test_tokenizers_are_equal_where_they_do_the_same_whatever_files_say_so(tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "three", "four")]
    for folder in folders:
        folder.mkdir()
    backend = make("byte-level")
    one, two, three, four = (
        load_tokenizer(saved(folder, backend, **files))
        for folder, files in zip(
            folders,
            [
                {"config": {"pad_token": "<a>"}},
                {"special_tokens_map": {"pad_token": "<a>"}},
                {"config": {"pad_token": "<b>"}},
                {"config": {"pad_token": "<a>", "split_special_tokens": True}},
            ],
            strict=True,
        )
    )
    assert one == two
    assert one != three and one != four and one != None  # noqa: E711


def test_half_a_character_is_an_input_error(folder):
    with pytest.raises(InputError, match="half character at position 2"):
        load_tokenizer(folder).encode("a \ud83d")


# ---- an engine's prompts and texts ------------------------------------------------------------------------


def engine_that_says(folder, text, prompt, end_ids=(2,)):
    tokenizer = load_tokenizer(folder)
    begin = tokenizer.encode(prompt)
    script = tokenizer.encode(prompt + text)
    assert script[: len(begin)] == begin
    return Scripted([*script[len(begin) :], 2], end_ids, tokenizer)


def test_generate_and_stream_read_on_from_the_prompt(folder, kind):
    prompt, text = "Once upon", " there was a river"
    engine = engine_that_says(folder, text, prompt)
    greedy = SamplingParams(temperature=0, max_tokens=30)
    (answer,) = engine.generate(prompt, greedy)
    tokens = list(engine.stream(prompt, greedy))
    assert answer.text == text == "".join(token.text for token in tokens)
    assert [token.token_id for token in tokens] == answer.token_ids


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("stopped", [True, False], ids=["by an end token", "by max_tokens"])
def test_a_stream_that_ends_inside_a_character_gives_what_generate_gives(folder, kind, stopped):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("Once \N{PARTY POPPER}")[len(tokenizer.encode("Once")) : -1]
    engine = Scripted([*ids, 2] if stopped else ids, (2,), tokenizer)
    cut = SamplingParams(temperature=0, max_tokens=len(ids) + stopped)
    (answer,) = engine.generate("Once", cut)
    tokens = list(engine.stream("Once", cut))
    assert answer.text.endswith("\ufffd")
    assert "".join(token.text for token in tokens) == answer.text
    assert [token.token_id for token in tokens] == answer.token_ids == ids


@pytest.mark.parametrize("kind", BYTES)
def test_an_answer_without_a_token_is_empty_even_where_the_prompt_ends_inside_a_character(folder, kind):
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.encode("Once \N{PARTY POPPER}")[:-1]
    engine = Scripted([2], (2,), tokenizer)
    for stop in ((), "x"):
        sampling = SamplingParams(temperature=0, stop=stop)
        assert engine.generate(prompt, sampling)[0].text == "" and list(engine.stream(prompt, sampling)) == []


def test_the_widgets_tokens_read_as_within_a_text(tmp_path):
    from helpers.course.widgets import candidates, stream_choices

    engine = engine_that_says(saved(tmp_path, make("sentencepiece")), " there", "Once upon")
    prompt = engine.tokenize("Once upon")
    there = engine.tokenize("Once upon there")[-1]
    probabilities = torch.zeros(2048)
    probabilities[there], probabilities[engine.tokenize("k")[-1]], probabilities[2] = 0.5, 0.3, 0.2
    assert [text for text, _ in candidates(engine, probabilities, 3, prompt)] == [" there", "k", ""]
    parts = [engine.tokenizer._backend.token_to_id(name) for name in ("<0xE2>", "<0xE3>")]  # of different characters
    probabilities[parts] = 0.7
    assert [name for name, _ in candidates(engine, probabilities, 2, prompt)] == [f"(token {i})" for i in sorted(parts)]
    *_, last = stream_choices(engine, "Once upon", SamplingParams(temperature=0, max_tokens=5))
    assert last.text == " there" == last.chosen == engine.detokenize([there], prompt)


IDS = [5, 6, 7]
ARRAYS = [
    (5, 6, 7),
    np.array(IDS),
    np.array(IDS, dtype=np.uint16),
    [np.int64(5), 6, 7],
    torch.tensor(IDS),
    torch.tensor(IDS, dtype=torch.int32),
]


@pytest.mark.parametrize("prompt", ARRAYS, ids=lambda p: type(p).__name__)
def test_ids_may_come_as_a_tuple_or_an_array(prompt):
    engine = Scripted([9])
    assert engine.tokenize(prompt) == IDS
    one = SamplingParams(temperature=0, max_tokens=1)
    assert [g.prompt_token_ids for g in engine.generate(prompt, one)] == [IDS]
    assert [g.prompt_token_ids for g in engine.generate([prompt, prompt], one)] == [IDS, IDS]
    assert all(type(i) is int for i in engine.tokenize(prompt))


LOOKALIKES = {
    "BatchEncoding": BatchEncoding({"input_ids": IDS, "attention_mask": [1, 1, 1]}),
    "dict": {"input_ids": IDS},
    "keys": {"once": 1, "upon": 2},
    "bytes": b"Once",
    "bytearray": bytearray(b"Once"),
    "memoryview": memoryview(b"Once"),
    "set": {5, 6},
    "range": range(3),
    "generator": (i for i in IDS),
    "floats": [5.0, 6.0],
    "array of floats": np.array([5.0, 6.0]),
    "booleans": [True, False],
    "array of booleans": torch.tensor([True]),
    "texts and ids": [[5, "Once"]],
    "chat": [{"role": "user", "content": "hi"}],
    "number": 5,
    "nothing": None,
    "one number of torch": torch.tensor(5),
}


@pytest.mark.parametrize("prompt", LOOKALIKES.values(), ids=LOOKALIKES)
def test_what_only_looks_like_a_prompt_is_refused(prompt):
    engine = Scripted([9])
    for call in (engine.generate, engine.stream, engine.tokenize, engine.logits, engine.prefill):
        with pytest.raises(InputError) as refused:
            call(prompt)
        assert refused.value.fix
        if type(prompt) is not int and call in (engine.generate, engine.prefill):
            with pytest.raises(InputError):
                call([prompt])


def test_the_refusal_says_what_to_give_instead():
    for prompt, fix in ((LOOKALIKES["BatchEncoding"], "input_ids"), (b"Once", "decode"), ({1}, "engine.tokenize")):
        with pytest.raises(InputError) as refused:
            Scripted([9]).generate(prompt)
        assert fix in refused.value.fix


def test_no_worker_is_started_for_a_tokenizer_that_cannot_be_read(tmp_path, tiny_llama, monkeypatch):
    import shutil

    from helpers import load
    from helpers.backends.vllm import backend

    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    pointer(folder / "tokenizer.json")
    monkeypatch.setattr(backend, "Worker", lambda *arguments, **more: pytest.fail("a worker was started"))
    with pytest.raises(ModelError, match="tokenizer of 'model'"):
        load(BuildRecipe(model=str(folder), backend="vllm", max_input_len=16, max_seq_len=48))


def test_another_tokenizer_is_refused_for_backends_that_compile_nothing_too(tiny_llama):
    from helpers import load
    from helpers.course.troubles import other_tokenizer

    recipe = BuildRecipe(model=str(tiny_llama), backend="pytorch", **limits(max_input_len=16, max_seq_len=48))
    with pytest.raises(EngineMismatch):
        load(recipe, tokenizer=other_tokenizer())
    load(recipe, tokenizer=tiny_llama).close()


def test_a_tokenizer_is_known_by_its_folder_and_not_by_its_name(tiny_llama, tmp_path, monkeypatch):
    """A Path names a folder, though it be called as the bundled model is; what is saved alone has no config.json."""
    import shutil

    from helpers import load
    from helpers.course.troubles import other_tokenizer

    monkeypatch.chdir(tmp_path)
    shutil.copytree(other_tokenizer(), "stories")
    recipe = BuildRecipe(model=str(tiny_llama), backend="pytorch", **limits(max_input_len=16, max_seq_len=48))
    with pytest.raises(EngineMismatch):
        load(recipe, tokenizer=Path("stories"))
    load(recipe, tokenizer="stories").close()  # the bundled one
    Path("alone").mkdir()
    with pytest.raises(EngineMismatch):
        load(recipe, tokenizer="alone")
    shutil.copy(tiny_llama / "tokenizer.json", "alone")
    load(recipe, tokenizer="alone").close()
