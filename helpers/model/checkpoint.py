"""A checkpoint by name: its files, their digests and its tensors, without transformers' model code."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from os.path import lexists
from pathlib import Path, PurePath
from stat import S_ISDIR
from typing import TYPE_CHECKING, Any

from helpers.digests import file_digest
from helpers.errors import ModelError, out_of_memory, shown
from helpers.model.config import (
    ModelConfig,
    cannot_open,
    expected_shapes,
    read_config,
    read_fields,
    read_json,
    unsupported,
    why_damaged,
)
from helpers.paths import check_is_file, check_working_folder, models_folder

if TYPE_CHECKING:
    import torch

BUNDLED = Path(__file__).parent / "stories" / "checkpoint"
NAMED = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # short names, and the Hub ids of what they mean
SHAPES = Path(__file__).parent / "shapes"  # configurations of public models, for dummy weights: dummy:tinyllama-1.1b
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# What is taken from the Hub: no pickles, no code, and not the same weights in other formats.
ON_THE_HUB, LEFT_OUT = ["*.json", "*.safetensors", "chat_template.jinja"], ["*/*", "consolidated*"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in Hugging Face format. With `dummy`, only its configuration and tokenizer are used and the
    weights are random: right for speed, meaningless for text. `name` finds it again from any folder: of a local
    checkpoint it has the whole path."""

    name: str
    folder: Path
    dummy: bool

    @property
    def short_name(self) -> str:
        """The name in an engine's identity: a local checkpoint's folder, because its content counts, not its path."""
        plain = self.name.removeprefix("dummy:")
        return ("dummy:" if self.dummy else "") + (self.folder.name if Path(plain).is_absolute() else plain)

    @cached_property
    def config(self) -> ModelConfig:
        config = read_config(self.folder)
        if config.tie_word_embeddings and not self.dummy and has_own_head(self.folder):
            config = replace(config, tie_word_embeddings=False)
        return config

    def check(self, max_seq_len: int) -> None:
        """ModelError unless this model is supported, its weights are whole, and its sequences may become this long."""
        config = self.config
        if not self.dummy:
            if (self.folder / "adapter_config.json").exists():  # transformers then computes with what it names
                raise unsupported(
                    "it is, or comes with, an adapter (adapter_config.json)",
                    "Merge the two with peft's merge_and_unload() and save_pretrained(); if they are merged already, "
                    "move the adapter's files away.",
                )
            check_weights(self.folder, config)
        if max_seq_len > (limit := config.max_length):
            window = f"a sliding window of {limit} tokens" if limit == config.sliding_window else ""
            raise ModelError(
                f"max_seq_len={max_seq_len} is more than the {limit} positions this model was trained for.",
                cause=f"Beyond them it attends through {window}, which is not supported." if window else "",
                fix=f"Set max_seq_len to at most {limit}.",
            )

    def check_sole_weights(self, library: str) -> None:
        """ModelError where other weights lie beside those that count: `library` reads every file that it lists."""
        counted = [] if self.dummy else weight_files(self.folder)
        for path in sorted(self.folder.glob("*.safetensors")):
            # A consolidated file's tensors have other names; what is hidden, glob.glob does not list.
            if counted and path not in counted and not path.name.startswith(("consolidated", ".")):
                raise ModelError(
                    f"{library} would read {path.name} of {self.name!r} too, which is none of its weights.",
                    cause="A backup, or a shard of an earlier save: of two tensors with one name, the last one counts.",
                    fix=f"Move {path.name} to another folder.",
                )

    def digest(self) -> str:
        """sha256 over all that decides what is computed and where texts end; dummy weights are the configuration's."""
        files = [self.folder / "config.json"]
        # Which tokens end a text, and what makes transformers compute with an adapter.
        others = [self.folder / name for name in ("generation_config.json", "adapter_config.json")]
        files += [path for path in others if lexists(path)]
        return _digest(files + ([] if self.dummy else weight_files(self.folder)), "dummy" if self.dummy else "")

    def tokenizer_digest(self) -> str:
        """sha256 over all files that decide how text becomes ids; "" for a checkpoint without a tokenizer."""
        paths = [self.folder / name for name in TOKENIZER_FILES]
        return _digest([path for path in paths if lexists(path)]) if self.has_tokenizer else ""

    @property
    def has_tokenizer(self) -> bool:
        return lexists(self.folder / "tokenizer.json")


def find_checkpoint(name: str) -> Checkpoint:
    """The checkpoint that `name` means: "stories", a name or a Hub id that `helpers model get` brought, a folder, or
    "dummy:" before any of these or before a folder's name in helpers/model/shapes. Nothing is downloaded.
    Raises ModelError. Whether the model can be built is only known after `check`, which imports transformers."""
    if not isinstance(name, str):
        raise ModelError(f"A model is named by a text, not by {shown(name)}.", fix="Such as 'stories'.")
    dummy = name.startswith("dummy:")
    plain = name.removeprefix("dummy:")
    if plain == "stories":
        folder = BUNDLED
    elif dummy and plain in {shape.name for shape in SHAPES.iterdir()}:
        folder = SHAPES / plain
    elif plain in NAMED:
        folder = models_folder() / plain
        if not is_folder(str(folder)):
            raise _not_here(plain)
        folder = folder.resolve()
    elif is_folder(plain):
        folder = Path(plain).expanduser().resolve()
        name = f"dummy:{folder}" if dummy else str(folder)  # which means the same after a change of folder
    elif is_hub_id(plain):
        folder = _hub_folder(plain)
    else:
        raise ModelError(
            f"There is no model {plain!r}.",
            cause=f"It is no name of the course ({', '.join(['stories', *NAMED])}), no folder here, and no Hub id "
            "(owner/name).",
            fix="Use model='stories', or the path of a folder that holds config.json and *.safetensors.",
        )
    read_fields(folder)
    return Checkpoint(name, folder, dummy)


def is_folder(name: str) -> bool:
    try:
        path = Path(name).expanduser()
        return S_ISDIR(path.stat().st_mode)
    except PermissionError as error:  # it may be a folder: not a reason to say that there is none
        raise cannot_open(path, error) from error
    except (OSError, RuntimeError, ValueError):  # a name too long, of an unknown user, or with a zero byte in it
        return False


def is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and ":" not in name and not name.startswith((".", "/", "~")) and not lexists(name)


def _hub_folder(hub_id: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:  # without the patterns, what `helpers model get` left out would count as missing
        return Path(
            snapshot_download(hub_id, local_files_only=True, allow_patterns=ON_THE_HUB, ignore_patterns=LEFT_OUT)
        )
    except (OSError, ValueError, RuntimeError):  # not in the cache, no Hub id at all, or a cache under nobody's home
        cached = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
        is_folder(str(cached / "refs" / "main"))  # ModelError where it is here, and not for this user
        raise _not_here(hub_id) from None


def _not_here(name: str) -> ModelError:
    return ModelError(
        f"The model {name!r} is not on this machine.",
        cause="It has not been downloaded; this course downloads nothing without being asked."
        + (f" If it is a folder: none of that name is in {Path.cwd()}." if "/" in name else ""),
        fix=f"Run: helpers model get {name}"
        + ("; or give the folder's whole path." if "/" in name else f". A folder of that name is given as ./{name}"),
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read: model.safetensors, else the shards that the index names. Another file
    beside them is a backup, a shard of an earlier save, or the same weights in another format. Raises ModelError."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        raise ModelError(
            f"{folder.name!r} holds no {SINGLE} and no {INDEX}.",
            cause="Its weights are pickles (*.bin), which can run code when they are read."
            if any(folder.glob("*.bin"))
            else "The download was cut short, or only the configuration was copied.",
            fix="Use a safetensors version of the checkpoint, or 'dummy:' before its name for random weights.",
        )
    shards = read_json(folder / INDEX).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    for name in names or [None]:
        if not isinstance(name, str) or PurePath(name).name != name or "\\" in name or not (folder / name).is_file():
            raise ModelError(
                f"{INDEX} of {folder.name!r} names {name!r:.80}, which is no file of this folder.",
                cause="A shard is missing, because a download was cut short, or the index was changed.",
                fix="Fetch the checkpoint again.",
            )
    return [folder / name for name in sorted(set(names))]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, by the headers of the files alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint. One that two shards hold is the later one's, as in transformers."""
    tensors: dict[str, Stored] = {}
    for path in weight_files(folder):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (it is not a dict)
                header = file.get_slice(name)
                tensors[name] = Stored(path, tuple(header.get_shape()), header.get_dtype())
    return tensors


@contextlib.contextmanager
def opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    """A file of tensors, open for reading onto the device. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    check_working_folder()  # safetensors imports PyTorch
    try:
        check_is_file(path)
        path.open("rb").close()  # for safetensors, what cannot be opened is not there
        file = safe_open(path, framework="pt", device=device)
    except SafetensorError as error:
        cause, fix = why_damaged(path, "The file is incomplete.", "Fetch it again.")
        raise ModelError(
            f"{path.name} of {path.parent.name!r} cannot be read: {error}.", cause=cause, fix=fix
        ) from error
    except (OSError, RuntimeError) as error:  # torch, which opens it as well, says in words what the system refuses
        raise out_of_memory(error) or cannot_open(path, error) from error
    with file:
        yield file


def check_weights(folder: Path, config: ModelConfig) -> None:
    """Every tensor that the configuration asks for is there, with its shape, in a type that can be read."""
    tensors = stored_tensors(folder)
    for name, shape in expected_shapes(config).items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape:
            instead = f"has shape {tensor.shape}" if tensor else "is missing"
            raise ModelError(
                f"Tensor {name!r} of {folder.name!r} {instead}; config.json asks for {shape}.",
                cause="A shard is missing, config.json belongs to another model, or this one was saved for embeddings "
                "or scores: its tensors' names differ, or it has no head that writes text.",
                fix="Fetch the checkpoint again, or use a model that writes text.",
            )
        if tensor.dtype not in ("F32", "BF16", "F16", "F64"):
            raise unsupported(
                f"tensor {name!r} is of type {tensor.dtype}", "Use the original checkpoint and set precision."
            )


def has_own_head(folder: Path) -> bool:
    """The files hold an output head that is not the embedding, as where adapters were merged into it. transformers 5
    and vLLM compute with it whatever tie_word_embeddings says; transformers 4 and TensorRT-LLM would not."""
    tensors = stored_tensors(folder)
    pair = [tensors.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    if pair[0] is None or pair[1] is None:
        return False
    import numpy as np
    import torch

    with opened(pair[0].file) as one, opened(pair[1].file) as other:
        embedding, head = one.get_tensor("model.embed_tokens.weight"), other.get_tensor("lm_head.weight")
    if embedding.shape != head.shape:
        return True
    if embedding.dtype != head.dtype:
        return not bool((embedding == head).all())
    # By bytes and with NumPy: torch would compare with threads, which a forked process waits for in vain.
    return not np.array_equal(*(tensor.view(torch.uint8).numpy() for tensor in (embedding, head)))


def read_tensors(checkpoint: Checkpoint, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that the configuration asks for, one after the other, so that no second model is ever in memory.

    config: the checkpoint's, given because a worker process has it from the engine's folder, without transformers.
    """
    import torch

    shapes = expected_shapes(config)
    if checkpoint.dummy:
        # Type and device are named, because a notebook may have set others as torch's defaults.
        generator = torch.Generator("cpu").manual_seed(0)
        for name, shape in shapes.items():
            values = torch.ones(shape, dtype=torch.float32, device="cpu")
            yield name, values if "norm" in name else values.normal_(0.0, 0.02, generator=generator)
        return
    tensors = {name: stored for name, stored in stored_tensors(checkpoint.folder).items() if name in shapes}
    for path in sorted({stored.file for stored in tensors.values()}):
        with opened(path) as file:
            for name, stored in tensors.items():
                if stored.file == path:
                    yield name, file.get_tensor(name)


def _digest(files: list[Path], salt: str = "") -> str:
    total = hashlib.sha256(salt.encode())
    for path in files:
        try:
            total.update(f"{path.name} {file_digest(path)}\n".encode())
        except OSError as error:
            raise cannot_open(path, error) from error
    return total.hexdigest()
