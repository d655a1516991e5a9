"""The `tensorrt` backend: TensorRT's own builder."""

import sys

from helpers.paths import PYTHON

INSTALL = f"{PYTHON} -m pip install tensorrt-rtx==1.7.1.116"  # the version that the course names
WHY_MISSING = "NVIDIA makes no TensorRT for macOS." if sys.platform == "darwin" else "It was not installed here."
