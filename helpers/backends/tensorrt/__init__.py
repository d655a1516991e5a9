"""The `tensorrt` backend: TensorRT's own builder."""

INSTALL = "pip install tensorrt-rtx==1.7.1.116"  # the version that the course names
