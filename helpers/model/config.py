"""config.json of a checkpoint, as transformers reads it, and what an engine keeps of it.

transformers' own configuration class is the only reader of config.json, with its defaults and its precedence. It is
imported when something is built. The build writes model.json beside the engine, so that loading does without it.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from dataclasses import asdict, dataclass, field, fields
from os.path import lexists
from pathlib import Path
from typing import Any

from helpers.errors import BackendUnavailable, EngineCorrupt, ModelError, out_of_memory, why_refused
from helpers.paths import is_utf8, read_text

# transformers loads its parts when first asked, and its logger has one level for all threads.
ONE_AT_A_TIME = threading.Lock()
MODEL_FILE = "model.json"  # in an engine's folder
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = {  # the largest that is read, several times what public models have
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
}
# With these, transformers would compute something else than the decoder here does, or take other weights.
COMPUTED_OTHERWISE = {
    **dict.fromkeys(("quantization_config", "compression_config", "quantization"), "its weights are already quantized"),
    "transformers_weights": "its weights are in a file of another name (transformers_weights)",
    "per_layer_config": "its layers have settings of their own (per_layer_config)",
    "attention_chunk_size": "it attends within chunks of a text (attention_chunk_size)",
}
# What transformers' class is given. The rest of config.json changes no number of these families, and some of it would
# make transformers run, fetch or allocate what the checkpoint asks for (attn_implementation, num_labels).
FIELDS = {
    *SIZES,
    *("rms_norm_eps", "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias", "eos_token_id"),
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
}
ROPE_TYPES = {  # and the numbers that each needs beside rope_theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder: its shape, in Hugging Face's field names where there is one, and where texts end."""

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
    rope: dict[str, Any] = field(hash=False)  # rope_type, rope_theta, and what that type needs
    sliding_window: int | None  # how many tokens some layer sees, where that is not all of them
    qkv_bias: bool  # Qwen2 has one on the query, key and value projections
    output_bias: bool  # on the attention's output projection
    mlp_bias: bool
    qk_norm: bool  # Qwen3 normalizes each head's query and key
    eos_token_ids: tuple[int, ...]  # each ends a text

    @property
    def max_length(self) -> int:
        """The longest sequence: linear scaling stretches the positions, and a longer one would need the window."""
        stretch = self.rope["factor"] if self.rope["rope_type"] == "linear" else 1
        length = int(self.max_position_embeddings * stretch)
        return min(length, self.sliding_window or length)

    def parameter_count(self) -> int:
        return sum(math.prod(shape) for shape in expected_shapes(self).values())

    def kv_cache_bytes(self, batch_size: int, seq_len: int, bytes_per_value: int) -> int:
        """2 (K and V) x layers x KV heads x head_dim x tokens x bytes."""
        per_token = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
        return per_token * batch_size * seq_len * bytes_per_value


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


def read_fields(folder: Path) -> dict[str, Any]:
    """config.json without a field that matters to nothing here. ModelError where it is missing, of another family, or
    has a size that transformers itself would not survive; this much is known without importing transformers."""
    path = folder / "config.json"
    try:
        there = path.exists()
    except PermissionError as error:
        raise ModelError(f"You may not look into {folder.name!r}.", fix="Ask its owner for it.") from error
    if not there:
        raise ModelError(
            f"{folder.name!r} is not a checkpoint: it has no config.json.",
            cause="The folder holds something else, or a download was cut short.",
            fix="Give a folder in Hugging Face format: config.json, tokenizer.json, *.safetensors.",
        )
    raw = read_json(path)
    if raw.get("model_type") not in FAMILIES:
        raise unsupported(
            f"model_type is {raw.get('model_type')!r:.80}", f"The supported families are {', '.join(FAMILIES)}."
        )
    refused = [why for name, why in COMPUTED_OTHERWISE.items() if raw.get(name)]
    if raw.get("is_causal") is False:
        refused.append("its tokens attend to those after them too (is_causal)")
    if (folder / "hf_quant_config.json").exists():  # ModelOpt's, which vLLM and TensorRT-LLM follow
        refused.append("its weights are already quantized (hf_quant_config.json)")
    if refused:
        raise unsupported(refused[0], "Use another model; for quantized weights the original ones, and set precision.")
    given = {name: value for name, value in raw.items() if name in FIELDS}
    bounds = SIZES | {"sliding_window": SIZES["max_position_embeddings"], "max_window_layers": SIZES["vocab_size"]}
    for name, most in bounds.items():
        _check_size(folder, name, given.get(name), most, least=0 if name == "max_window_layers" else 1)
    return {"model_type": raw["model_type"], **given}


def transformers_config(folder: Path) -> Any:
    """transformers' configuration of a checkpoint's folder. No code of the checkpoint is run, nothing is fetched."""
    given = read_fields(folder)
    with ONE_AT_A_TIME:
        try:
            from transformers import CONFIG_MAPPING, __version__
            from transformers.utils import logging

            reader = CONFIG_MAPPING[given["model_type"]]
            reader()  # what fails here is no fault of the file: torch's parts are imported, and want a temporary folder
        except Exception as error:
            if isinstance(error, KeyError):
                raise BackendUnavailable(
                    f"transformers {__version__} does not know models of type {given['model_type']!r}.",
                    cause="It is older than the course needs: another package may have brought it.",
                    fix="helpers doctor says which version belongs here.",
                ) from error
            first: BaseException = error  # transformers says over it that a module cannot be imported, and not why
            while first.__cause__:
                first = first.__cause__
            raise out_of_memory(error) or BackendUnavailable(
                f"transformers, which reads config.json, cannot be imported: {' '.join(str(first).split()):.300}.",
                cause=why_refused(error),
                fix="Mend that (helpers doctor may tell more), and start Python again.",
            ) from error
        rope = given.get("rope_scaling") or given.get("rope_parameters")
        if __version__ < "5" and isinstance(rope, dict):
            # 4 knows the first name alone, and no rope_theta under it. 5 writes the second alone, and rope_theta there.
            given |= {"rope_scaling": rope} | {name: value for name, value in rope.items() if name == "rope_theta"}
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # its warnings would repeat in a terminal whatever the file says
        try:
            return reader.from_dict(given)
        except Exception as error:  # what its classes and validators raise for wrong values differs between versions
            raise _not_understood(folder, " ".join(str(error).split())) from error
        finally:
            logging.set_verbosity(verbosity)


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a checkpoint's folder; ModelError if it is missing, unreadable or not supported."""
    config = transformers_config(folder)
    kind = config.model_type
    if config.hidden_act != "silu":
        raise unsupported(f"its activation is {config.hidden_act!r:.80}", "Only 'silu' is supported.")
    sizes: dict[str, int] = {}
    for name, most in SIZES.items():
        size: Any = getattr(config, name, None)
        if name == "head_dim" and size is None:  # Qwen2's class has none
            size = config.hidden_size // config.num_attention_heads
        _check_size(folder, name, 0 if size is None else size, most)
        sizes[name] = size
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
        raise _not_understood(folder, "the key-value heads do not divide the attention heads, or head_dim is odd")
    if not _is_number(config.rms_norm_eps) or not 0 <= config.rms_norm_eps < 1:
        raise _not_understood(folder, f"rms_norm_eps is {config.rms_norm_eps!r:.80}")
    switches = {name: getattr(config, name, False) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise _not_understood(folder, f"{name} is {value!r:.80}")
    attention_bias = switches["attention_bias"] and kind in ("llama", "qwen3")
    return ModelConfig(
        model_type=kind,
        **sizes,
        rms_norm_eps=float(config.rms_norm_eps),
        tie_word_embeddings=switches["tie_word_embeddings"],
        rope=_rope(folder, config),
        sliding_window=_window(folder, config),
        qkv_bias=attention_bias or kind == "qwen2",
        output_bias=attention_bias,
        mlp_bias=switches["mlp_bias"] and kind == "llama",
        qk_norm=kind == "qwen3",
        eos_token_ids=_end_ids(folder, config.eos_token_id),
    )


def save_config(config: ModelConfig, folder: Path) -> None:
    """Write what loading the engine in `folder` needs to know of the model."""
    (folder / MODEL_FILE).write_text(json.dumps(asdict(config), indent=1), encoding="utf-8")


def load_config(folder: Path) -> ModelConfig:
    """What a build wrote into its engine's folder."""
    try:
        stored = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
        if stored.keys() != {field.name for field in fields(ModelConfig)}:
            raise ValueError("its fields are others")
        return ModelConfig(**{**stored, "eos_token_ids": tuple(stored["eos_token_ids"])})
    except (FileNotFoundError, ValueError, TypeError, AttributeError) as error:
        raise EngineCorrupt(
            f"{MODEL_FILE} of engine {folder.name!r} cannot be read: {error}.",
            cause="Another version of this course built the engine, or the file was changed.",
            fix="Remove the engine and build it again.",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A checkpoint's JSON file; ModelError where it is not one."""
    try:
        values = json.loads(read_text(path), parse_constant=_refuse_constant)
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not names with values")
        return values
    except OSError as error:
        raise cannot_open(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path.name} of {path.parent.name!r} is not valid JSON: {error}.",
            cause="The file was changed by hand, or a download was cut short.",
            fix="Mend the file, or fetch the checkpoint again.",
        ) from error


def cannot_open(path: Path, error: Exception) -> ModelError:
    """The error for a checkpoint's file that the operating system refuses."""
    return ModelError(
        f"{path.name} of {path.parent.name!r} cannot be opened: {(str(error).splitlines() or [''])[0]}.",
        cause=why_refused(error),
        fix="Mend that, or fetch the checkpoint again.",
    )


def why_damaged(path: Path, cause: str, fix: str) -> tuple[str, str]:
    """Likely cause and fix for a checkpoint's file that is none of its kind: the given ones, unless it is a pointer, or
    lies where libraries written in Rust open nothing."""
    if not is_utf8(path):
        cause = "The name of a folder above it is not UTF-8, and this library takes no other."
        fix = "Rename that folder."
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            cause = f"{path.name} is a Git LFS pointer: the repository was cloned without its large files."
            fix = "Run `git lfs pull` in that folder."
    return cause, fix


def unsupported(what: str, fix: str) -> ModelError:
    return ModelError(f"This model is not supported: {what}.", fix=fix)


def _rope(folder: Path, config: Any) -> dict[str, Any]:
    """transformers 5 has all in rope_parameters; 4 has rope_theta, and rope_scaling for scaled kinds."""
    given = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    if not isinstance(given, dict):
        raise _not_understood(folder, f"its position encoding is {given!r:.80}")
    given = {"rope_theta": getattr(config, "rope_theta", None), **given}
    kind = given.get("rope_type", given.get("type", "default"))  # what is there and null, transformers refuses too
    if kind not in ROPE_TYPES:
        raise unsupported(f"its position encoding is {kind!r:.80}", f"Supported are {', '.join(ROPE_TYPES)}.")
    if given.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) not in (None, 1.0):
        raise unsupported("it rotates only a part of each head", "Use a model that rotates whole heads.")
    if kind == "llama3":
        original = given.setdefault("original_max_position_embeddings", config.max_position_embeddings)
        beside = getattr(config, "original_max_position_embeddings", None)
        if beside not in (None, original):  # which one counts is another in each version of transformers
            raise _not_understood(folder, f"original_max_position_embeddings is both {original} and {beside!r:.80}")
    rope: dict[str, Any] = {"rope_type": kind}
    for name in ("rope_theta", *ROPE_TYPES[kind]):
        rope[name] = given.get(name)
        if not _is_number(rope[name]) or not 0 < rope[name] <= 1e12:
            raise _not_understood(folder, f"{name} of its position encoding is {rope[name]!r:.80}")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise _not_understood(folder, "high_freq_factor of its position encoding is not above low_freq_factor")
    return rope


def _window(folder: Path, config: Any) -> int | None:
    """The sliding window, if a layer has one: all of Mistral's do, and else those that layer_types names. transformers'
    Llama knows of none, but its cache, which is the same for all, keeps no more than the window either."""
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if config.model_type == "mistral" or layers is None:
        return window
    if not isinstance(layers, list):
        raise _not_understood(folder, f"layer_types is {layers!r:.80}")
    if others := set(map(str, layers)) - {"full_attention", "sliding_attention"}:
        raise unsupported(f"some layers are of the type {min(others)!r:.80}", "Use another model.")
    if "sliding_attention" not in layers:
        return None
    if window is None:
        raise _not_understood(folder, "layers with sliding attention have no sliding_window")
    return window


def _end_ids(folder: Path, from_config: Any) -> tuple[int, ...]:
    """The ids that end a text: what generation_config.json says, else config.json."""
    path = folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if lexists(path) else None  # a link to nothing is refused
    ids = from_config if ids is None else ids
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ModelError(
            f"eos_token_id of {folder.name!r} is {ids!r:.80}.",
            cause="generation_config.json or config.json was written by hand.",
            fix="Make it a token id, or a list of them.",
        )
    return tuple(ids)


def _check_size(folder: Path, name: str, value: Any, most: int, least: int = 1) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        words = "a whole number too long to print" if isinstance(value, int) and value > 1 << 64 else f"{value!r:.80}"
        raise _not_understood(folder, f"{name} is {words}, not a whole number from {least} to {most}")


def _is_number(value: Any) -> bool:
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def _not_understood(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"config.json of {folder.name!r} cannot be understood: {why:.300}.",
        cause="It was changed by hand, or belongs to another kind of model.",
        fix="Fetch the checkpoint again.",
    )


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON's")
