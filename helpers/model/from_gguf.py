"""A GGUF file, llama.cpp's format, written anew as a checkpoint in Hugging Face format.

It reads what `helpers model get` brings: a Llama with SmolLM's tokenizer. All other files are refused. What it writes
depends on the file alone, never on a library's version, so that an engine has the same name on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import ModelError
from helpers.model.checkpoint import SINGLE
from helpers.model.config import expected_shapes, read_config, unsupported

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

# What the reader below takes for granted: the metadata that differ are of a file that it does not understand.
EXPECTED = {
    "general.architecture": "llama",
    "llama.rope.scaling.type": "none",
    "tokenizer.ggml.model": "gpt2",  # byte-level BPE
    "tokenizer.ggml.pre": "smollm",  # how a text is cut into words first
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_eos_token": False,
}
USE_ORIGINAL = "Use the checkpoint that the file was made from."
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # values of tokenizer.ggml.token_type


def convert(file: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, the tokenizer and model.safetensors (bf16) into `folder`.
    Raises ModelError."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise ModelError(
            f"{file.name} cannot be read as GGUF: {error}.",
            cause="It is another kind of file, or was cut short.",
            fix="Fetch it again.",
        ) from error
    metadata = {field.name: field.contents() for field in reader.fields.values()}
    for name, value in EXPECTED.items():
        if metadata.get(name, value) != value:
            raise unsupported(f"{file.name} has {name} = {metadata[name]!r}", USE_ORIGINAL)
    _write_configuration(metadata, "output.weight" not in {tensor.name for tensor in reader.tensors}, folder)
    _write_tokenizer(metadata, folder)
    _write_weights(reader, folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_configuration(metadata: dict[str, Any], tied: bool, folder: Path) -> None:
    tokens = {
        f"{name}_token_id": metadata[f"tokenizer.ggml.{long}_token_id"]
        for name, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    heads, width = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata.get("llama.attention.key_length", width // heads),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": _number(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _number(metadata["llama.rope.freq_base"]),
        "rope_scaling": None,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **tokens,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", tokens)


def _number(value: float) -> float:
    """The decimal number that was rounded to a float32: 1e-05, which reads as 9.999999747378752e-06 otherwise."""
    import numpy as np

    return float(str(np.float32(value)))


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if strange := set(kinds) - {NORMAL, CONTROL, USER_DEFINED}:
        raise unsupported(f"a token of kind {strange.pop()}", USE_ORIGINAL)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    # SmolLM cuts a text before and after every digit first, so that none is joined with what stands beside it.
    digits = {"type": "Digits", "individual_digits": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == CONTROL,
            }
            for i, kind in enumerate(kinds)
            if kind != NORMAL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }
    _write_json(folder / "tokenizer.json", content)
    names = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    special = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{long}_token_id"]]
        for name, long in names
        if f"tokenizer.ggml.{long}_token_id" in metadata
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the class that takes tokenizer.json as it is
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    _write_json(folder / "tokenizer_config.json", settings)


def _write_weights(reader: GGUFReader, folder: Path) -> None:
    import torch
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map
    from safetensors.torch import save_file

    config = read_config(folder)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    gguf_names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    weights = {}
    for name, shape in expected_shapes(config).items():
        tensor = stored.pop(gguf_names.get_name(name, try_suffixes=(".weight",)) or "", None)
        if tensor is None or tuple(reversed(tensor.shape.tolist())) != shape:  # GGUF names the innermost size first
            raise unsupported(f"tensor {name!r} is missing, or of another shape than {shape}", "Fetch the file again.")
        values = dequantize(tensor.data, tensor.tensor_type)  # float32
        if name.endswith("q_proj.weight"):
            values = _rotary_halves(values, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            values = _rotary_halves(values, config.num_key_value_heads)
        weights[name] = torch.from_numpy(values.copy()).to(torch.bfloat16)
    if stored:
        raise unsupported(f"the file holds a tensor {min(stored)!r}", USE_ORIGINAL)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


def _rotary_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of a head's rows. Rotary embedding turns pairs of them: llama.cpp keeps the two of a pair
    side by side, Hugging Face's Llama in the two halves of the head. rows: [heads * head_dim, hidden_size]."""
    head_dim = rows.shape[0] // heads
    return rows.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
