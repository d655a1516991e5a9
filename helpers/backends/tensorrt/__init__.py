"""The `tensorrt` backend: TensorRT's own builder."""

import sys

from helpers.paths import PYTHON

# What installs each Python package that load_provider imports, in the version that the course names.
INSTALL = {
    "tensorrt_rtx": f"{PYTHON} -m pip install tensorrt-rtx==1.7.1.116",
    "tensorrt": f"{PYTHON} -m pip install tensorrt==10.14.1.48.post1",  # TensorRT-LLM's, of constraints/trtllm.txt
    "tensorrt_llm": "helpers env create trtllm",
}
WHY_MISSING = "NVIDIA makes no TensorRT for macOS." if sys.platform == "darwin" else "It was not installed here."
