"""A GGUF file, llama.cpp's format, written anew as a checkpoint in Hugging Face format.

It reads the one file that `helpers model get` brings, SmolLM2-135M-Instruct; what is the same for all of that model
lies in the folder smollm2 (from the file's own metadata, and for the tokenizer from the model's page). What it writes
depends on these files alone, never on a library's version, so that an engine has the same name on every machine.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.errors import ModelError
from helpers.model.checkpoint import SINGLE
from helpers.model.config import expected_shapes, read_config, unsupported

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

SETTINGS = Path(__file__).parent / "smollm2"


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
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        shutil.copy(SETTINGS / name, folder / name)
    tokens, merges = (reader.fields[f"tokenizer.ggml.{part}"].contents() for part in ("tokens", "merges"))
    tokenizer = json.loads((SETTINGS / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"] |= {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    text = json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    _write_weights(reader, folder)


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
        raise unsupported(f"the file holds a tensor {min(stored)!r}", "Use the checkpoint that it was made from.")
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


def _rotary_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of a head's rows. Rotary embedding turns pairs of them: llama.cpp keeps the two of a pair
    side by side, Hugging Face's Llama in the two halves of the head. rows: [heads * head_dim, hidden_size]."""
    head_dim = rows.shape[0] // heads
    return rows.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
