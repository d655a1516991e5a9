"""The `aot` backend: PyTorch's AOTInductor."""
