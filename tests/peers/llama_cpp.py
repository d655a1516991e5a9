"""llama.cpp by its binding llama-cpp-python: f32, Q8_0 and Q4_1, which are called fp32, int8 and int4 here.

The GGUF file is written from the checkpoint by llama.cpp's own package gguf. With Q4_1 the embedding, which is the head
too, is Q8_0, as in the file of SmolLM2 that people share. Products of quantized weights quantize the activations too.
"""

import ctypes
import json
from pathlib import Path

from tests.peers.worker import calls

TYPES = {"fp32": ("F32", "F32"), "int8": ("Q8_0", "Q8_0"), "int4": ("Q4_1", "Q8_0")}  # of products, of the embedding
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
state = {}


def build(model, folder, precision, scratch):
    """A Llama without biases and with plain rope; no tokenizer, for token ids go in and come out."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
    heads, kv_heads, vocabulary = (config[n] for n in ("num_attention_heads", "num_key_value_heads", "vocab_size"))
    rope = config.get("rope_parameters") or config
    Path(folder).mkdir()
    writer = gguf.GGUFWriter(Path(folder, "model.gguf"), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("none")
    for source, tensor in load_file(Path(model, "model.safetensors")).items():
        name, values = source, tensor.float().numpy()
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        for part, count in (("attn_q", heads), ("attn_k", kv_heads)):
            if part in name:  # llama.cpp rotates neighbours, where this checkpoint rotates halves
                values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        product, embedding = TYPES[precision]
        kind = "F32" if values.ndim == 1 else embedding if name in ("token_embd.weight", "output.weight") else product
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(folder, threads):
    import llama_cpp as lib

    state["lib"] = lib
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(Path(folder, "model.gguf")).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx = 256
    if Path(folder).name.endswith("fp32"):  # else attention rounds to fp16, and logits are off by 8e-4
        params.type_k = params.type_v = lib.GGML_TYPE_F32
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if threads:
        params.n_threads = params.n_threads_batch = threads
    state["context"] = lib.llama_init_from_model(model, params)
    state["vocabulary"] = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))


def step(ids):
    """Logits [V] after these tokens, which follow what the cache holds."""
    import numpy

    lib, context = state["lib"], state["context"]
    tokens = (ctypes.c_int32 * len(ids))(*ids)
    if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))):
        raise RuntimeError("llama_decode failed")
    return numpy.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (state["vocabulary"],))


def generate(ids, count):
    lib = state["lib"]
    lib.llama_memory_clear(lib.llama_get_memory(state["context"]), True)
    for _ in range(count):
        token = int(step(ids).argmax())
        yield token
        ids = [token]


def logits(ids):
    lib = state["lib"]
    lib.llama_memory_clear(lib.llama_get_memory(state["context"]), True)
    return step(ids).tolist()


CALLS = calls(build, load, generate, logits, ("llama-cpp-python",))
