"""Stand-in. Source: tensorrt_llm/plugin/plugin.py (PluginConfig as a pydantic model, after pull request 8277)."""

from pydantic import BaseModel, ConfigDict

_Type = str | None


def _load_plugin_lib() -> None:
    """The real one loads libnvinfer_plugin_tensorrt_llm.so and calls initTrtLlmPlugins(None, b"tensorrt_llm")."""
    import tensorrt

    tensorrt.registered_plugins.add("tensorrt_llm")


class PluginConfig(BaseModel):
    """A name that is not here is dropped without a word when the object is made: extra="ignore"."""

    model_config = ConfigDict(validate_assignment=True, extra="ignore")

    dtype: str = "float16"
    bert_attention_plugin: _Type = "auto"
    gpt_attention_plugin: _Type = "auto"
    gemm_plugin: _Type = None
    gemm_swiglu_plugin: _Type = None
    low_latency_gemm_plugin: _Type = None
    low_latency_gemm_swiglu_plugin: _Type = None
    fp8_rowwise_gemm_plugin: _Type = None
    qserve_gemm_plugin: _Type = None
    gemm_allreduce_plugin: _Type = None
    nccl_plugin: _Type = "auto"
    lora_plugin: _Type = None
    dora_plugin: bool = False
    moe_plugin: _Type = "auto"
    mamba_conv1d_plugin: _Type = "auto"
    weight_only_quant_matmul_plugin: _Type = None
    weight_only_groupwise_quant_matmul_plugin: _Type = None
    smooth_quant_gemm_plugin: _Type = None
    smooth_quant_plugins: bool = True
    layernorm_quantization_plugin: _Type = None
    rmsnorm_quantization_plugin: _Type = None
    identity_plugin: _Type = None
    context_fmha: bool = True
    bert_context_fmha_fp32_acc: bool = False
    paged_kv_cache: bool | None = None
    remove_input_padding: bool = True
    tokens_per_block: int = 32
    use_paged_context_fmha: bool = True
    use_fp8_context_fmha: bool = True
    fuse_fp4_quant: bool = False
    norm_quant_fusion: bool = False
    reduce_fusion: bool = False
    user_buffer: bool = False
    use_fused_mlp: bool = True
    multiple_profiles: bool = False
    manage_weights: bool = False
    paged_state: bool = True
    streamingllm: bool = False
    pp_reduce_scatter: bool = False
