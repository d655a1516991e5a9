"""A checkpoint by name, its configuration, its tokenizer and its weights, without transformers' model code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import ModelError

if TYPE_CHECKING:
    import torch

BUNDLED = Path(__file__).parent / "stories" / "checkpoint"
SHAPES = Path(__file__).parent / "shapes"  # configurations of public models, for dummy weights: dummy:tinyllama-1.1b
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = {  # and what each needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
SIZES = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size "
    "max_position_embeddings"
).split()
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in Hugging Face format. With `dummy`, only its configuration and tokenizer are used and the
    weights are random: right for speed, meaningless for text."""

    name: str
    folder: Path
    dummy: bool

    @property
    def short_name(self) -> str:
        """The name in an engine's identity: a local checkpoint's folder, because its content counts, not its path."""
        return ("dummy:" if self.dummy else "") + (self.folder.name if self._is_local else self._plain_name)

    @property
    def full_name(self) -> str:
        """The name that finds this checkpoint again from any folder: of a local checkpoint its whole path."""
        return ("dummy:" if self.dummy else "") + (str(self.folder) if self._is_local else self._plain_name)

    @property
    def _plain_name(self) -> str:
        return self.name.removeprefix("dummy:")

    @property
    def _is_local(self) -> bool:
        """Given as a folder, not as a name that means the same on every machine."""
        return self._plain_name != "stories" and Path(self._plain_name).expanduser().is_dir()

    def check_length(self, max_seq_len: int) -> None:
        """ModelError if a sequence may become longer than the model was trained for."""
        limit = self.config.max_position_embeddings
        if max_seq_len > limit:
            raise ModelError(
                f"max_seq_len={max_seq_len} is more than the {limit} positions this model was trained for.",
                fix=f"Set max_seq_len to at most {limit}.",
            )

    @property
    def config(self) -> ModelConfig:
        return read_config(self.folder)

    def digest(self) -> str:
        """sha256 over configuration and weights; for dummy weights, over the configuration alone."""
        files = [self.folder / "config.json"] + ([] if self.dummy else weight_files(self.folder))
        return _digest(files, "dummy" if self.dummy else "")

    def tokenizer_digest(self) -> str:
        return _digest([self.folder / "tokenizer.json"]) if self.has_tokenizer else ""

    @property
    def has_tokenizer(self) -> bool:
        return (self.folder / "tokenizer.json").exists()

    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, from generation_config.json, else config.json."""
        for name in ("generation_config.json", "config.json"):
            if (self.folder / name).exists():
                ids = _read_json(self.folder / name).get("eos_token_id")
                if ids is not None:
                    return tuple(ids) if isinstance(ids, list) else (ids,)
        return ()


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-family decoder, in Hugging Face's field names where there is one."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: dict[str, Any]  # rope_type, rope_theta, and what that type needs
    qkv_bias: bool  # Qwen2 has one on the query, key and value projections
    output_bias: bool  # on the attention's output projection
    mlp_bias: bool
    qk_norm: bool  # Qwen3 normalizes each head's query and key

    def parameter_count(self) -> int:
        c = self
        attention = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
        per_layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
        embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
        return c.num_hidden_layers * per_layer + embeddings + c.hidden_size

    def kv_cache_bytes(self, batch_size: int, seq_len: int, bytes_per_value: int) -> int:
        """2 (K and V) x layers x KV heads x head_dim x tokens x bytes."""
        per_token = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
        return per_token * batch_size * seq_len * bytes_per_value


def find_checkpoint(name: str) -> Checkpoint:
    """The checkpoint that `name` means: "stories", a folder, a Hub id that is already in the local Hub cache,
    or "dummy:" before any of these or before a folder's name in helpers/model/shapes. Nothing is downloaded.
    Raises ModelError."""
    dummy = name.startswith("dummy:")
    plain = name.removeprefix("dummy:")
    if plain == "stories":
        folder = BUNDLED
    elif dummy and plain in {shape.name for shape in SHAPES.iterdir()}:
        folder = SHAPES / plain
    elif _is_folder(plain):
        folder = Path(plain).expanduser().resolve()
    elif plain.count("/") == 1 and not plain.startswith((".", "/", "~")):
        folder = _hub_folder(plain)
    else:
        raise ModelError(
            f"There is no model {plain!r}.",
            cause="It is neither 'stories', nor a folder here, nor a Hub id of the form owner/name.",
            fix="Use model='stories', or the path of a folder that holds config.json and *.safetensors.",
        )
    checkpoint = Checkpoint(name, folder, dummy)
    read_config(folder)
    if not dummy:
        check_weights(checkpoint)
    return checkpoint


def _is_folder(name: str) -> bool:
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # a name too long, of an unknown user, or with a zero byte in it
        return False


def download_checkpoint(hub_id: str) -> Path:
    """Fetch a checkpoint from the Hugging Face Hub into its cache: configuration, tokenizer, safetensors only."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"]))


def _hub_folder(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, FileNotFoundError):
        raise ModelError(
            f"The model {hub_id!r} is not on this machine.",
            cause="It has not been downloaded; this course downloads nothing without being asked.",
            fix=f"Run: python -m helpers download {hub_id}",
        ) from None


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a checkpoint folder; ModelError if it is missing, unreadable or not supported."""
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(
            f"{folder.name!r} is not a checkpoint: it has no config.json.",
            cause="The folder holds something else, or a download was cut short.",
            fix="Give a folder in Hugging Face format: config.json, tokenizer.json, *.safetensors.",
        )
    raw = _read_json(path)
    try:
        return _parse_config(raw)
    except KeyError as missing:
        raise ModelError(
            f"config.json of {folder.name!r} has no field {missing}.", fix="Fetch the checkpoint again."
        ) from missing
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"config.json of {folder.name!r} cannot be understood: {error}.", fix="Fetch the checkpoint again."
        ) from error


def _parse_config(raw: dict[str, Any]) -> ModelConfig:
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise _unsupported(f"model_type is {kind!r}", f"The supported families are {', '.join(FAMILIES)}.")
    if raw.get("hidden_act", "silu") != "silu":
        raise _unsupported(f"its activation is {raw['hidden_act']!r}", "Only 'silu' is supported.")
    window = raw.get("sliding_window")
    if window and raw.get("use_sliding_window", kind == "mistral") and window < raw["max_position_embeddings"]:
        raise _unsupported(f"it attends through a sliding window of {window}", "Use a model with full attention.")
    if raw.get("quantization_config"):
        raise _unsupported("its weights are already quantized", "Use the original checkpoint and set precision.")
    heads = raw["num_attention_heads"]
    bias = bool(raw.get("attention_bias", False))
    config = ModelConfig(
        model_type=kind,
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        vocab_size=raw["vocab_size"],
        max_position_embeddings=raw["max_position_embeddings"],
        rms_norm_eps=raw["rms_norm_eps"],
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope=_parse_rope(raw),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias and kind != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)) and kind == "llama",
        qk_norm=kind == "qwen3",
    )
    for name in SIZES:
        if not isinstance(value := getattr(config, name), int) or value < 1:
            raise ValueError(f"{name} is {value!r}")
    if heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError("the key-value heads do not divide the attention heads, or head_dim is odd")
    return config


def _parse_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`; 4.57 writes `rope_theta` and, for scaled kinds, `rope_scaling`."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    if rope["rope_type"] not in ROPE_TYPES:
        raise _unsupported(f"its position encoding is {rope['rope_type']!r}", f"Supported are {', '.join(ROPE_TYPES)}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported("it rotates only a part of each head", "Use a model that rotates whole heads.")
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
    for name in ROPE_TYPES[rope["rope_type"]]:
        if not isinstance(rope[name], (int, float)):
            raise ValueError(f"{name} of its position encoding is {rope[name]!r}")
    return rope


def _unsupported(what: str, fix: str) -> ModelError:
    return ModelError(f"This model is not supported: {what}.", fix=fix)


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def check_weights(checkpoint: Checkpoint) -> None:
    """Every tensor that the configuration asks for is there with its shape; reads only the files' headers."""
    from safetensors import SafetensorError, safe_open

    files = weight_files(checkpoint.folder)
    if not files:
        pickles = list(checkpoint.folder.glob("*.bin"))
        raise ModelError(
            f"{checkpoint.folder.name!r} holds no *.safetensors file.",
            cause="Its weights are pickles (*.bin), which can run code when they are read."
            if pickles
            else "The download was cut short, or only the configuration was copied.",
            fix="Use a safetensors version of the checkpoint, or 'dummy:' before its name for random weights.",
        )
    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (safe_open is not a dict)
                    found = file.get_slice(key)
                    shapes[key], types[key] = tuple(found.get_shape()), found.get_dtype()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path.name} of {checkpoint.folder.name!r} cannot be read: {error}.",
                cause="The file is incomplete.",
                fix="Fetch it again.",
            ) from error
    for name, shape in expected_shapes(checkpoint.config).items():
        if shapes.get(name) != shape:
            instead = f"has shape {shapes[name]}" if name in shapes else "is missing"
            raise ModelError(
                f"Tensor {name!r} of {checkpoint.folder.name!r} {instead}; config.json asks for {shape}.",
                cause="A shard is missing, or config.json belongs to another model.",
                fix="Fetch the checkpoint again.",
            )
        if types[name] not in ("F32", "BF16", "F16", "F64"):
            raise _unsupported(
                f"tensor {name!r} is of type {types[name]}", "Use the original checkpoint and set precision."
            )


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor names and shapes of this configuration."""
    c = config
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "model.norm.weight": (c.hidden_size,),
    }
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (c.hidden_size,)
        shapes[layer + "post_attention_layernorm.weight"] = (c.hidden_size,)
        linears = {
            "self_attn.q_proj": (queries, c.hidden_size, c.qkv_bias),
            "self_attn.k_proj": (keys, c.hidden_size, c.qkv_bias),
            "self_attn.v_proj": (keys, c.hidden_size, c.qkv_bias),
            "self_attn.o_proj": (c.hidden_size, queries, c.output_bias),
            "mlp.gate_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
            "mlp.up_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
            "mlp.down_proj": (c.hidden_size, c.intermediate_size, c.mlp_bias),
        }
        for name, (rows, columns, bias) in linears.items():
            shapes[layer + name + ".weight"] = (rows, columns)
            if bias:
                shapes[layer + name + ".bias"] = (rows,)
        if c.qk_norm:
            shapes[layer + "self_attn.q_norm.weight"] = (c.head_dim,)
            shapes[layer + "self_attn.k_norm.weight"] = (c.head_dim,)
    return shapes


def read_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors one after the other, on the CPU, so that no second model is ever in memory."""
    import torch
    from safetensors import safe_open

    shapes = expected_shapes(checkpoint.config)
    if checkpoint.dummy:
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            if "norm" in name:
                yield name, torch.ones(shape)
            else:
                yield name, torch.empty(shape).normal_(0.0, 0.02, generator=generator)
        return
    for path in weight_files(checkpoint.folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is not a dict)
                if name in shapes:
                    yield name, file.get_tensor(name)


def _digest(files: list[Path], salt: str = "") -> str:
    total = hashlib.sha256(salt.encode())
    for path in files:
        total.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                total.update(block)
    return total.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"it holds a {type(fields).__name__}, not names with values")
        return fields
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path.name} of {path.parent.name!r} is not valid JSON: {error}.", fix="Fetch the checkpoint again."
        ) from error
