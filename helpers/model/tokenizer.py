"""Text to token ids and back, as transformers does it for a checkpoint, by the tokenizers library alone.

The file tokenizer.json is not the whole tokenizer. A training run leaves its truncation and padding in it, and tokens
that were added later may be named only in the files beside it. Its post-processor decides whether a BOS or EOS token is
added, as in transformers 5; that of tokenizer_config.json's add_bos_token was read by 4.57 for a few classes only.

How a text is cut is what tokenizer.json says. So it is in transformers 4.57, in TensorRT-LLM 1.2.1, which has that one,
and in transformers 5 for most classes. For LlamaTokenizer and Qwen2Tokenizer, 5 takes only vocabulary and merges from
the file, and makes the rest anew: a Llama tokenizer then puts its space before the first word alone, unless `legacy` is
true, where many files (Llama 2, TinyLlama) put one behind each special token too. add_prefix_space is followed by both
versions, against the file; where the two contradict each other, the checkpoint is refused. A decoded text is left as it
is: where clean_up_tokenization_spaces is true, 4.57 takes spaces before punctuation away, and 5 too but for BPE.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import InputError, ModelError
from helpers.model.chat import ChatTemplate, read_chat_template
from helpers.model.config import cannot_open, read_json, why_damaged
from helpers.paths import check_is_file

if TYPE_CHECKING:
    import tokenizers

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no whole character
LONGEST_WAIT = 64  # tokens; bytes that are no character after so many will not become one
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # of tokenizers with byte fallback


class Tokenizer:
    """Text to token ids and back. Special tokens, such as the end of a text, are no part of a decoded text."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: ChatTemplate | None = None):
        self._backend, self.chat_template = backend, chat_template
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's token ids. With add_special_tokens, a BOS token comes first where the model expects one; a text
        that begins with it already, as one from a chat template may, gets no second one."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"The text holds a half character at position {error.start}.",
                cause="It was read with another encoding than it was written in.",
                fix="Read it as UTF-8.",
            ) from error
        try:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises nothing more exact, and its panics are no Exception
            raise ModelError(
                f"The tokenizer cannot read the text: {error}.",
                cause="The text has what its vocabulary lacks, an unknown token too; or tokenizer.json is damaged.",
                fix="Fetch the checkpoint again; of your own tokenizer, put its special tokens into its vocabulary.",
            ) from error
        ids = encoding.ids
        doubled = encoding.special_tokens_mask[:2] == [1, 0] and ids[0] == ids[1]  # 1: added, 0: from the text
        return ids[1:] if doubled else ids

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The token that ends a turn of a chat: eos_token. A checkpoint's configuration may name another one only."""
        eos = self.chat_template.tokens.get("eos_token") if self.chat_template else None
        token = self._backend.token_to_id(eos) if eos else None
        return () if token is None else (token,)

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of the ids, as it reads after those of `after`: the same as an IncrementalDetokenizer gives."""
        if not ids:
            return ""
        detokenizer = IncrementalDetokenizer(self, after)
        text = detokenizer.add(*ids) + detokenizer.end()
        if INCOMPLETE in text:  # byte fallback spoils a whole run of bytes for one that is missing; token by token not
            detokenizer = IncrementalDetokenizer(self, after)
            text = "".join([detokenizer.add(token) for token in ids]) + detokenizer.end()
        return text

    def decode_alone(self, ids: list[int]) -> str:
        """The text of the ids as a text of its own: a decoder takes the space from its first word."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def __eq__(self, other: object) -> bool:
        """Whether every text has the same ids in both, whatever files say so."""
        if not isinstance(other, Tokenizer):
            return NotImplemented
        mine, its = self._backend, other._backend
        return mine.encode_special_tokens == its.encode_special_tokens and mine.to_str() == its.to_str()

    def has_text(self, token: int) -> bool:
        return token not in self._special and self._backend.id_to_token(token) is not None

    def byte(self, token: int) -> int | None:
        """The byte that a token of byte fallback stands for; None for any other token."""
        match = BYTE_TOKEN.fullmatch(self._backend.id_to_token(token) or "")
        return int(match[1], 16) if match else None


class IncrementalDetokenizer:
    """The text of an answer, token by token, as it reads after the prompt's ids.

    What a token's text is depends on its neighbours: a decoder takes the space from the first word of a text, and a
    character's bytes may lie in several tokens. So new tokens are decoded behind one token of the text before them,
    and the text of that one is cut off. What is no whole character yet is held back. A step decodes a few tokens,
    however long the answer is.
    """

    def __init__(self, tokenizer: Tokenizer | None, after: Sequence[int]):
        self._tokenizer = tokenizer  # None: there is no text
        self._context: list[int] = []  # the token before, or none at the beginning of a text
        self._waiting: list[int] = []  # tokens whose text is not complete
        self._handed_out = 0  # characters of their text
        if tokenizer is None:
            return
        # If the prompt ends inside a character, the answer begins with that character. So its last tokens are read,
        # and not from inside a character on: with byte fallback that would spoil all the bytes that follow.
        start = max(0, len(after) - 8)
        while start > 0 and 0x80 <= (tokenizer.byte(after[start]) or 0) < 0xC0:  # UTF-8 goes on
            start -= 1
        self._remember(after[:start])
        for token in after[start:]:
            self.add(token)

    def add(self, *tokens: int) -> str:
        """The text that is complete with these tokens."""
        self._waiting += tokens
        text = self._text()
        return self._hand_out(text, text if len(self._waiting) > LONGEST_WAIT else text.rstrip(INCOMPLETE))

    def end(self) -> str:
        """What was held back, when no token follows."""
        return self._hand_out(self._text(), self._text())

    @property
    def holds_back(self) -> bool:
        return bool(self._waiting)

    def _text(self) -> str:
        if self._tokenizer is None:
            return ""
        before = self._tokenizer.decode_alone(self._context)
        return self._tokenizer.decode_alone(self._context + self._waiting)[len(before) :]

    def _hand_out(self, text: str, complete: str) -> str:
        new = complete[self._handed_out :]
        self._handed_out = len(complete)
        if complete == text:
            self._remember(self._waiting)
            self._waiting, self._handed_out = [], 0
        return new

    def _remember(self, tokens: Sequence[int]) -> None:
        """Keep the last of the tokens that has text. A byte token is kept only if there was no other before: it would
        make one run with bytes that follow, which are then decoded together."""
        if self._tokenizer is None:
            return
        has_text, byte = self._tokenizer.has_text, self._tokenizer.byte
        last = next((i for i in reversed(tokens) if has_text(i) and byte(i) is None), None)
        if last is not None:
            self._context = [last]
        elif not self._context:
            self._context = [i for i in tokens[-LONGEST_WAIT:] if has_text(i)]


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint or engine folder, None if it has none. ModelError if it cannot be read."""
    import tokenizers

    path = folder / "tokenizer.json"
    if not lexists(path):  # a link to nothing is refused, here and below
        return None
    try:
        check_is_file(path)
        path.open("rb").close()  # what the system refuses, tokenizers says in words
        backend = tokenizers.Tokenizer.from_file(str(path))
        config = _config(folder)
        if backend.padding:
            config.setdefault("pad_token", backend.padding["pad_token"])
        backend.no_truncation()
        backend.no_padding()
        for token in _declared_tokens(folder, backend, config):
            backend.add_tokens([token])
        _check_prefix_space(folder, backend, config)
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        named = {name: _added_token(config[name]).content for name in NAMED_TOKENS if config.get(name)}
        chat_template = read_chat_template(folder, config, named)
    except (ModelError, KeyboardInterrupt, SystemExit):
        raise
    except OSError as error:
        raise cannot_open(Path(error.filename or path), error) from error
    except BaseException as error:  # the library raises nothing more exact, and its panics are no Exception
        cause = f"A file is damaged, or written for a newer library than tokenizers {tokenizers.__version__}."
        cause, fix = why_damaged(path, cause, "Fetch the checkpoint again, or update tokenizers.")
        what = f"The tokenizer of {folder.name!r} cannot be read: {error}."
        raise ModelError(what, cause=cause, fix=fix) from error
    return Tokenizer(backend, chat_template)


def _check_prefix_space(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """ModelError where transformers would put a space before a text and tokenizer.json does not, or the other way."""
    kind = str(config.get("tokenizer_class")).partition("Tokenizer")[0]
    asked = config.get("add_prefix_space", None if kind == "Llama" else False)
    space = {"Llama": "\u2581", "GPT2": "\u0120", "Qwen2": "\u0120"}.get(kind)  # as it is written in a token
    if space and isinstance(asked, bool) and backend.token_to_id(space) is not None:
        first = backend.encode("a", add_special_tokens=False).tokens[:1]
        if asked != any(token.startswith(space) for token in first):
            raise ModelError(
                f"add_prefix_space is {asked} for {folder.name!r}, and tokenizer.json does otherwise.",
                cause="tokenizer_config.json was changed, or the two files are of different models.",
                fix="With transformers 5, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) unites them.",
            )


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; where it does not name all tokens itself, with special_tokens_map.json."""
    config: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if lexists(folder / name) and "added_tokens_decoder" not in config:
            config |= read_json(folder / name)
    return config


def _declared_tokens(
    folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any]
) -> list[tokenizers.AddedToken]:
    """The tokens that files beside tokenizer.json name, in the order in which transformers numbers them.

    Older checkpoints have special_tokens_map.json and added_tokens.json, which says nothing of what tokenizer.json has
    too; newer ones name all in tokenizer_config.json, under added_tokens_decoder, and the two others do not count.
    """
    from tokenizers import AddedToken

    older, added_file = "added_tokens_decoder" not in config, folder / "added_tokens.json"
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    named = [_added_token(entry) for entry in [*map(config.get, NAMED_TOKENS), *extra] if entry]
    names = {token.content for token in named}
    in_file = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    if older:
        ids = read_json(added_file) if lexists(added_file) else {}
        declared = [
            AddedToken(content, special=content in names, normalized=content not in names)
            for content in sorted(ids, key=ids.__getitem__)
            if content not in in_file
        ]
        for name in filter(None, map(config.get, NAMED_TOKENS)):  # special, whatever tokenizer.json says of it
            if token := in_file.get(_added_token(name).content):
                kept = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
                declared.append(AddedToken(token.content, special=True, **kept))
    else:
        entries = sorted(config["added_tokens_decoder"].items(), key=lambda entry: int(entry[0]))
        declared = [_added_token(entry, special=entry["content"] in names or entry["special"]) for _, entry in entries]
    known = {*in_file, *(token.content for token in declared)}
    return declared + [token for token in named if token.content not in known]


def _added_token(entry: str | dict[str, Any], special: bool = True) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    fields = {"content": entry} if isinstance(entry, str) else {k: v for k, v in entry.items() if k != "__type"}
    return AddedToken(**{**fields, "special": special})
