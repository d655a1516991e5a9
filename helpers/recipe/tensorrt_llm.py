"""What a recipe may say to TensorRT-LLM 1.2.1 beyond the common fields, checked when the recipe is made.

In a recipe file these stand in a section [tensorrt_llm]. TensorRT-LLM itself drops a plugin name that it does not know
without a word (its PluginConfig ignores extra fields), and a name that does nothing on one GPU just as silently. So
every name of PluginConfig is listed here, with what it takes, or with the reason why it is refused.

Source: tensorrt_llm 1.2.1, plugin/plugin.py (PluginConfig) and llmapi/llm_args.py, read shortly before and after that
release; not run by us.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from helpers.errors import RecipeError
from helpers.paths import check_is_file
from helpers.recipe.fields import RecipeFields, not_allowed
from helpers.recipe.options import check_options, refuse_cpu

TYPES = ("auto", "float16", "float32", "bfloat16", "disable")
FP8 = ("fp8", "disable")

# Fusion options: the plugin's name, and the values that it takes here (bool: true or false; int: a whole number).
PLUGINS: dict[str, Any] = {
    "gemm_plugin": (*TYPES, "fp8"),  # cuBLASLt's products; "disable", the default, leaves them to TensorRT
    "gpt_attention_plugin": TYPES,  # attention and the KV cache's update in one kernel
    "context_fmha": bool,  # the same for prefill, in one kernel
    "use_paged_context_fmha": bool,  # prefill from a paged KV cache: chunks and reuse need it
    "use_fused_mlp": bool,  # gate and up projections as one product
    "multiple_profiles": bool,  # several ranges of shapes, with more kernels to choose from; a longer build
    "remove_input_padding": bool,
    "paged_kv_cache": bool,
    "tokens_per_block": int,
    "streamingllm": bool,
    "manage_weights": bool,
    "use_fp8_context_fmha": bool,
    "gemm_swiglu_plugin": FP8,
    "low_latency_gemm_plugin": FP8,
    "low_latency_gemm_swiglu_plugin": FP8,
    "fp8_rowwise_gemm_plugin": TYPES,
}
FP8_ONLY = [name for name in PLUGINS if name.startswith(("use_fp8", "gemm_swiglu", "low_latency", "fp8_"))]

# Fields that are refused, by the reason.
REASONS = {
    "it joins the work of several GPUs, and this course builds for one": (
        "reduce_fusion user_buffer gemm_allreduce_plugin nccl_plugin pp_reduce_scatter"
    ),
    "it needs the precision NVFP4, which Blackwell GPUs have and this course does not build": (
        "norm_quant_fusion fuse_fp4_quant"
    ),
    "TensorRT-LLM sets it by itself from the precision": (
        "weight_only_quant_matmul_plugin weight_only_groupwise_quant_matmul_plugin smooth_quant_gemm_plugin dtype "
        "smooth_quant_plugins layernorm_quantization_plugin rmsnorm_quantization_plugin qserve_gemm_plugin"
    ),
    "it is for another kind of model": (
        "bert_attention_plugin bert_context_fmha_fp32_acc moe_plugin mamba_conv1d_plugin paged_state"
    ),
    "the course uses no adapters": "lora_plugin dora_plugin",
    "it is for debugging TensorRT-LLM": "identity_plugin",
}
REFUSED = {name: reason for reason, names in REASONS.items() for name in names.split()}

# Options that are no plugins, and their defaults.
SETTINGS: dict[str, Any] = {
    "max_num_tokens": 0,  # tokens that a step takes from all sequences together; 0: prompts of a whole batch, to 8192
    "free_gpu_memory_fraction": 0.5,  # of the memory that is free once the weights are loaded; TensorRT-LLM says 0.9
    "kv_cache_quant_algo": "",  # "FP8" or "INT8", where the precision is calibrated; with fp8 it is FP8 anyway
    "gather_generation_logits": False,  # lets engine.logits answer; costs memory and time
    "calib_dataset": "",  # what fp8 and int4 are calibrated with: a folder with train.jsonl, or CALIBRATION_NAME
    "calib_batches": 256,  # with int4 TensorRT-LLM takes MOST_FOR_INT4 at most
    "calib_max_seq_length": 256,
}
PYTORCH_SETTINGS: dict[str, Any] = {
    "max_num_tokens": 0,
    "free_gpu_memory_fraction": 0.5,
    "cuda_graphs": True,
}
CALIBRATED = ("fp8", "int4")  # ModelOpt measures activations for FP8 and W4A16_AWQ
MOST_FOR_INT4 = 32  # texts: quantize_by_modelopt.py cuts what is more for AWQ, and only logs it
# TensorRT-LLM 1.2.1 goes by the data set's name (quantization/quantize_by_modelopt.py, get_calib_dataloader). These
# names stand for data of their own, wherever they occur in it: cnn_dailymail for configuration 3.0.0 and its column
# "article". Any other folder is read as split "train" and column "text", and any other name is a NotImplementedError.
CALIBRATION_NAME = "cnn_dailymail"
CALIBRATION_FILE = "train.jsonl"
OTHER_LAYOUTS = (CALIBRATION_NAME, "scienceqa", "science_qa", "pileval")
# The same file's get_hf_config and get_model take a checkpoint for one of another kind by such letters in its path.
OTHER_MODELS = ("mpt", "vila", "llava-onevision-qwen2")


def check(recipe: RecipeFields) -> None:
    """RecipeError for whatever this recipe asks of TensorRT-LLM and cannot get. Looks at no machine."""
    refuse_cpu(recipe, "TensorRT-LLM")
    if not (recipe.fusion.kernels and recipe.fusion.qkv):
        name = "kernels" if not recipe.fusion.kernels else "qkv"
        raise RecipeError(
            f"TensorRT-LLM has no switch for fusion.{name}.",
            cause="TensorRT decides by itself what it merges, and TensorRT-LLM always joins query, key and value.",
            fix="Leave it on. To see fusion's worth, switch options such as gemm_plugin, context_fmha, use_fused_mlp.",
        )
    # 0, the default of max_num_tokens, is no number of tokens: settings() puts one in its place.
    given = {name: value for name, value in recipe.options.items() if (name, value) != ("max_num_tokens", 0)}
    kinds = {name: type(default) for name, default in _known(recipe).items()}
    if recipe.backend == "tensorrt_llm":
        kinds |= PLUGINS
    check_options("TensorRT-LLM 1.2.1", given, kinds, REFUSED)
    if recipe.backend == "tensorrt_llm":
        _check_engine(recipe)
    fraction = recipe.options.get("free_gpu_memory_fraction", 0.5)
    if not 0 < fraction < 1:
        raise _wrong("free_gpu_memory_fraction", fraction, "a number between 0 and 1")
    tokens, least = recipe.options.get("max_num_tokens", 0), max(recipe.max_input_len, recipe.max_batch_size)
    if tokens and tokens < least:
        raise _wrong(
            "max_num_tokens", tokens, f"{least} or more: a step must take the longest prompt and a whole batch"
        )


def settings(recipe: RecipeFields) -> dict[str, Any]:
    """The options that are no plugins, with their defaults filled in."""
    chosen = {name: recipe.options.get(name, default) for name, default in _known(recipe).items()}
    batch = min(8192, recipe.max_batch_size * recipe.max_input_len)  # 8192 is TensorRT-LLM's default
    chosen["max_num_tokens"] = chosen["max_num_tokens"] or max(batch, recipe.max_input_len, recipe.max_batch_size)
    return chosen


def _known(recipe: RecipeFields) -> dict[str, Any]:
    return SETTINGS if recipe.backend == "tensorrt_llm" else PYTORCH_SETTINGS


def plugins(recipe: RecipeFields) -> dict[str, Any]:
    """The fields of PluginConfig that this recipe sets. "disable" is TensorRT-LLM's own word for None."""
    chosen = {name: recipe.options[name] for name in PLUGINS if name in recipe.options}
    if not recipe.fusion.gate_up:
        chosen["use_fused_mlp"] = False
    return chosen


def _check_engine(recipe: RecipeFields) -> None:
    options = recipe.options
    if recipe.optimization_level not in (0, 3):
        raise RecipeError(
            f"Recipe field optimization_level is {recipe.optimization_level}; TensorRT-LLM has two ways to build.",
            fix="Give 0 (fast_build: a quicker build, at times a slower engine) or 3 (the usual one).",
        )
    for name in FP8_ONLY:
        if options.get(name, "disable") not in ("disable", False) and recipe.precision != "fp8":
            raise RecipeError(
                f"Option {name} works on FP8 numbers, and the recipe's precision is {recipe.precision!r}.",
                fix="Use precision='fp8', or leave the option out.",
            )
    if options.get("use_paged_context_fmha") and options.get("streamingllm"):
        raise RecipeError(  # builder.py, build
            "Option use_paged_context_fmha would do nothing: TensorRT-LLM switches it off beside streamingllm.",
            fix="Give one of them.",
        )
    if options.get("manage_weights") is False and (recipe.precision, recipe.optimization_level) == ("fp8", 0):
        raise RecipeError(  # llmapi/llm_args.py, validate_build_config_remaining
            "Option manage_weights = false would do nothing: with precision 'fp8' at optimization_level 0 TensorRT-LLM "
            "switches it on.",
            fix="Leave it out, or build at level 3.",
        )
    if (algo := options.get("kv_cache_quant_algo", "")) not in ("", "FP8", "INT8"):
        raise _wrong("kv_cache_quant_algo", algo, "FP8 or INT8")
    if algo and recipe.precision not in CALIBRATED and not recipe.model.startswith("dummy:"):
        raise RecipeError(  # models/modeling_utils.py, QuantConfig: _requires_calibration
            f"Option kv_cache_quant_algo does not go with precision {recipe.precision!r}.",
            cause="The cache's scales are measured with texts: TensorRT-LLM would calibrate this precision too, and "
            "fetch a data set from the Hub.",
            fix=f"Use precision {' or '.join(map(repr, CALIBRATED))}, or leave the option out.",
        )
    if not calibrated(recipe) and (idle := next((name for name in options if name.startswith("calib_")), "")):
        raise RecipeError(
            f"Option {idle} would do nothing: this recipe is not calibrated.",
            cause=f"Only precisions {' and '.join(CALIBRATED)} are calibrated, and no dummy weights.",
            fix="Leave it out.",
        )
    if recipe.precision == "int4" and (texts := options.get("calib_batches", 0)) > MOST_FOR_INT4:
        raise _wrong("calib_batches", texts, f"{MOST_FOR_INT4} at most with precision 'int4': it would take no more")
    if options.get("gemm_plugin") == "fp8" and recipe.precision != "fp8":
        raise _wrong("gemm_plugin", "fp8", "another type, or precision='fp8' in the recipe")
    fused = plugins(recipe).get("use_fused_mlp", True)
    if options.get("use_fused_mlp") is True and not recipe.fusion.gate_up:
        raise RecipeError(
            "The recipe contradicts itself: use_fused_mlp is true, and fusion.gate_up is false.",
            cause="Both name the same thing: the two input projections of the MLP as one product.",
            fix="Give one of them.",
        )
    if options.get("gemm_swiglu_plugin") == "fp8" and not fused:
        raise RecipeError(
            "Option gemm_swiglu_plugin needs use_fused_mlp.",
            cause="It computes both input projections of the MLP and their product in one kernel.",
            fix="Leave use_fused_mlp and fusion.gate_up on, or leave gemm_swiglu_plugin out.",
        )


def calibrated(recipe: RecipeFields) -> bool:
    return recipe.precision in CALIBRATED and not recipe.model.startswith("dummy:")


def check_calibration(recipe: RecipeFields, checkpoint: Path) -> None:
    """Asked when a build begins: RecipeError if TensorRT-LLM would fetch what nobody asked for, run code that comes
    with data or weights (it loads both with trust_remote_code=True), or fail on its data set after minutes."""
    if not calibrated(recipe):
        return
    dataset = recipe.options.get("calib_dataset", "")
    layout = (
        f'a folder that holds {CALIBRATION_FILE}, one JSON object with a text under "text" a line, and nothing else'
    )
    fix = f"Set the option calib_dataset: {layout}; or {CALIBRATION_NAME!r}, to fetch that data set from the Hub."
    if not dataset:
        raise RecipeError(
            f"Precision {recipe.precision!r} is calibrated with texts, and the recipe names none.",
            cause="ModelOpt, which quantizes for TensorRT-LLM, would fetch the dataset cnn_dailymail from the Hub; "
            "this course downloads nothing without being asked.",
            fix=fix,
        )
    if problem := _dataset_problem(dataset):
        raise RecipeError(
            f"TensorRT-LLM cannot calibrate with {dataset!r}: {problem}.",
            cause="It takes one layout of a folder only, runs scripts that it finds there, and knows few names.",
            fix=fix,
        )
    file = Path(dataset).expanduser() / CALIBRATION_FILE
    if file.is_file() and (asked := recipe.options.get("calib_batches", 0)):
        texts = sum(bool(line.strip()) for line in file.read_text(encoding="utf-8").split("\n"))
        if texts < asked:
            raise _wrong("calib_batches", asked, f"{texts} at most: {dataset!r} holds no more texts")
    if letters := next((letters for letters in OTHER_MODELS if letters in str(checkpoint)), ""):
        raise RecipeError(
            f"TensorRT-LLM would calibrate another kind of model: the path {checkpoint} contains {letters!r}.",
            cause="By these letters, wherever they stand, it knows models of a kind that this course does not build.",
            fix="Move the checkpoint to a folder without them in its path.",
        )
    if code := _own_code(checkpoint):
        raise RecipeError(
            f"The checkpoint brings code of its own ({code}), which TensorRT-LLM would run while it calibrates.",
            cause="Its calibration loads model and tokenizer with trust_remote_code=True.",
            fix=f"Use a checkpoint without, or another precision than {' and '.join(CALIBRATED)}.",
        )


def _dataset_problem(dataset: str) -> str:
    """What keeps a data set from being loaded, and loaded as data only; "" if nothing does."""
    try:
        folder = Path(dataset).expanduser()
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else None
    except (OSError, RuntimeError) as error:  # RuntimeError: "~name" of nobody here
        return f"it cannot be read ({error})"
    if dataset == CALIBRATION_NAME:
        return "a folder or file of that name is here and would be taken for it" if folder.exists() else ""
    if there is None:
        return "it is no folder"
    if name := next((name for name in OTHER_LAYOUTS if name in str(folder.resolve()).lower()), ""):
        return f"its path contains {name!r}, which stands for a layout of its own"
    if mark := next((mark for mark in ("*", "?", "[", "::") if mark in str(folder.resolve())), ""):
        return f"its path contains {mark!r}, with which it stands for other folders too"  # the library matches files
    others = [name for name in there if name != CALIBRATION_FILE]
    if others:  # a script would be run, a README can name other files, a second data file can be another split
        return f"beside {CALIBRATION_FILE} it holds {others[0]!r}"
    try:
        check_is_file(folder / CALIBRATION_FILE)
        with (folder / CALIBRATION_FILE).open(encoding="utf-8") as lines:
            texts = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError):
        return f"it holds no readable {CALIBRATION_FILE}"
    for number, entry in enumerate(texts or [None], start=1):
        if not (isinstance(entry, dict) and isinstance(entry.get("text"), str) and entry["text"].strip()):
            return f"entry {number} of {CALIBRATION_FILE} has no text under 'text'"
        if len(entry) > 1 or any("\ud800" <= c <= "\udfff" for c in entry["text"]):
            # The library's reader (pyarrow) gives up on half a character, and on a field that is of another type later.
            return f"entry {number} of {CALIBRATION_FILE} holds more than a text under 'text', or half a character"
    return ""


def _own_code(checkpoint: Path) -> str:
    """What of a checkpoint makes transformers run code from it, or from another place that it names."""
    for file in sorted(checkpoint.rglob("*.py")):  # custom_generate/generate.py too
        return file.relative_to(checkpoint).as_posix()
    for name in ("config.json", "tokenizer_config.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError):  # what cannot be read names no code
            if "auto_map" in json.loads((checkpoint / name).read_text(encoding="utf-8")):
                return f"auto_map in {name}"
    return ""


def _wrong(name: str, value: Any, allowed: str) -> RecipeError:
    return not_allowed(f"Option {name} of TensorRT-LLM", value, allowed)
