"""The `tensorrt` backend: TensorRT's own builder."""
