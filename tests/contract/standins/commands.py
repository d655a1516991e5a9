"""The flags of TensorRT-LLM 1.2.1's commands, for a test that compares those that notebooks show.

Sources: tensorrt_llm/commands/build.py, bench.py, serve.py; bench/benchmark/throughput.py; bench/build/build.py, all
around that release; flags that only one side of it has are left out. trtllm-build has one flag more for each field of
PluginConfig.
"""

BUILD = """
checkpoint_dir model_config build_config output_dir max_batch_size max_input_len max_seq_len max_decoder_seq_len
max_beam_width max_num_tokens opt_num_tokens max_encoder_input_len max_prompt_embedding_table_size max_multimodal_len
kv_cache_type paged_kv_cache input_timing_cache output_timing_cache profiling_verbosity strip_plan weight_sparsity
weight_streaming fast_build workers log_level enable_debug_output visualize_network dry_run monitor_memory logits_dtype
gather_context_logits gather_generation_logits gather_all_token_logits lora_dir lora_ckpt_source lora_target_modules
max_lora_rank speculative_decoding_mode max_draft_len
"""
BENCH = "model model_path workspace log_level"
THROUGHPUT = """
engine_dir backend extra_llm_api_options max_batch_size max_num_tokens max_seq_len beam_width
kv_cache_free_gpu_mem_fraction dataset eos_id modality max_input_len num_requests warmup target_input_len
target_output_len tp pp ep cluster_size concurrency streaming report_json iteration_log output_json request_json
enable_chunked_context scheduler_policy
"""
BENCH_BUILD = """
tp_size pp_size quantization max_seq_len no_weights_loading trust_remote_code dataset max_batch_size max_num_tokens
target_input_len target_output_len
"""
SERVE = """
tokenizer host port backend log_level max_beam_width max_batch_size max_num_tokens max_seq_len tp_size pp_size ep_size
cluster_size gpus_per_node kv_cache_free_gpu_memory_fraction num_postprocess_workers trust_remote_code
extra_llm_api_options reasoning_parser metadata_server_config_file server_role fail_fast_on_attention_window_too_large
"""

FLAGS = {
    ("trtllm-build",): set(BUILD.split()),
    ("trtllm-bench", "throughput"): set(BENCH.split() + THROUGHPUT.split()),
    ("trtllm-bench", "build"): set(BENCH.split() + BENCH_BUILD.split()),
    ("trtllm-serve",): set(SERVE.split()),
}
BACKENDS = {"pytorch", "_autodeploy", "tensorrt"}  # of trtllm-bench and trtllm-serve
