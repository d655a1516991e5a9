"""Stand-in. Source: tensorrt_llm/llmapi/llm_args.py: the names that LLM's two classes take as keywords."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class KvCacheConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    enable_block_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: Any = None
    sink_token_length: int | None = None
    free_gpu_memory_fraction: float | None = 0.9
    host_cache_size: int | None = None
    onboard_blocks: bool = True
    cross_kv_cache_fraction: float | None = None
    secondary_offload_min_priority: int | None = None
    event_buffer_max_size: int = 0
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    use_uvm: bool = False
    max_gpu_total_bytes: int = 0
    dtype: str = "auto"
    mamba_ssm_cache_dtype: str = "auto"
    tokens_per_block: int = 32
    attention_dp_events_gather_period_ms: int = 5


class BuildCacheConfig:
    def __init__(self, cache_root: Any = None, max_records: int = 10, max_cache_storage_gb: float = 256):
        self.cache_root, self.max_records, self.max_cache_storage_gb = cache_root, max_records, max_cache_storage_gb


class CudaGraphConfig(BaseModel):
    batch_sizes: Any = None
    max_batch_size: int = 0
    enable_padding: bool = False


class SchedulerConfig(BaseModel):
    capacity_scheduler_policy: Any = "GUARANTEED_NO_EVICT"
    context_chunking_policy: Any = None
    dynamic_batch_config: Any = None


_COMMON = (
    "model_kwargs pipeline_parallel_size context_parallel_size gpus_per_node moe_cluster_parallel_size "
    "moe_tensor_parallel_size moe_expert_parallel_size enable_attention_dp pp_partition cp_config load_format "
    "enable_lora lora_config kv_cache_config enable_chunked_prefill guided_decoding_backend batched_logits_processor "
    "iter_stats_max_iterations request_stats_max_iterations peft_cache_config scheduler_config "
    "cache_transceiver_config sparse_attention_config speculative_config max_batch_size max_input_len max_seq_len "
    "max_beam_width max_num_tokens gather_generation_logits num_postprocess_workers postprocess_tokenizer_dir "
    "reasoning_parser decoding_config mpi_session _mpi_session otlp_traces_endpoint backend return_perf_metrics "
    "perf_metrics_max_requests orchestrator_type env_overrides"
).split()
_TRT = (
    "enable_tqdm workspace fail_fast_on_attention_window_too_large enable_build_cache "
    "extended_runtime_perf_knob_config calib_config quant_config embedding_parallel_mode fast_build build_config "
    "enable_prompt_adapter max_prompt_adapter_token batching_type normalize_log_probs"
).split()
_TORCH = (
    "cuda_graph_config attn_backend sampler_type disable_overlap_scheduler moe_config torch_compile_config "
    "enable_autotuner enable_layerwise_nvtx_marker enable_iter_perf_stats print_iter_log stream_interval "
    "allreduce_strategy batch_wait_timeout_ms garbage_collection_gen0_threshold force_dynamic_quantization "
    "checkpoint_format enable_min_latency disable_flashinfer_sampling max_stats_len"
).split()
TRT_ARGS = {*_COMMON, *_TRT}
TORCH_ARGS = {*_COMMON, *_TORCH}
TRT_ONLY = set(_TRT)
