"""The backends `tensorrt_llm` and `tensorrt_llm_pytorch`: TensorRT-LLM 1.2.1."""
