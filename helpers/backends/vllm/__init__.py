"""The `vllm` backend: vLLM 0.25.1."""
