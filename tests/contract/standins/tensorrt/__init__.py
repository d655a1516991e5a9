"""Stand-in for tensorrt 10.14.1 (see ../README.md): reading a plan, and EngineInspector.

Source: NVIDIA's documentation of TensorRT 10.16 (engine tools; Python API: Runtime, ICudaEngine, EngineInspector), its
guide for the step from 10 to 11 for the changed keys, and, for plugins that are not loaded, issues 1913 and 3327 of
NVIDIA/TensorRT.
"""

import enum
import json
import os
from typing import Any, Optional

__version__ = "10.14.1.48.post1" if os.environ.get("STANDIN_INSPECTOR") != "11" else "11.4.1"
registered_plugins: set = set()


class LayerInformationFormat(enum.IntEnum):
    ONELINE = 0
    JSON = 1


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class Runtime:
    def __init__(self, logger: ILogger):
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Optional["ICudaEngine"]:
        """None for what cannot be read; the reason goes to the logger."""

        def refuse(message: str) -> None:
            self.logger.log(ILogger.Severity.ERROR, message)

        if "tensorrt_llm" not in registered_plugins:
            refuse(
                "[pluginV2Runner.cpp::load::300] Error Code 1: Serialization (Serialization assertion creator failed."
                "Cannot deserialize plugin since corresponding IPluginCreator not found in Plugin Registry)"
            )
            return None
        try:
            plan = json.loads(serialized_engine)
        except ValueError:
            refuse(
                "Error Code 1: Serialization (Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed."
                "Version tag does not match. Note: Current Version: 243, Serialized Engine Version: 240)"
            )
            return None
        return ICudaEngine(plan)


class ICudaEngine:
    def __init__(self, plan: dict):
        self._plan = plan
        self.num_layers = len(_LAYERS)
        self.num_optimization_profiles = 1

    def create_engine_inspector(self) -> "EngineInspector":
        return EngineInspector(self._plan)


class EngineInspector:
    execution_context: Any = None

    def __init__(self, plan: dict):
        self._plan = plan

    def get_layer_information(self, layer_index: int, format: LayerInformationFormat) -> str:
        return json.dumps(_layer(*_LAYERS[layer_index]))

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        names = self._plan.get("names_only") or os.environ.get("STANDIN_INSPECTOR") == "names"
        layers = [name for name, *_ in _LAYERS] if names else [_layer(*parts) for parts in _LAYERS]
        bindings = "I/O Tensors" if os.environ.get("STANDIN_INSPECTOR") == "11" else "Bindings"
        return json.dumps({"Layers": layers, bindings: ["input_ids", "logits"]})


# Names in the form of NVIDIA's troubleshooting page: plugins keep layers of their own, merged ones are joined.
_BASE = "LlamaForCausalLM/transformer/layers/0"
_LAYERS = (
    ("LlamaForCausalLM/transformer/vocab_embedding/GATHER_0", "Gather"),
    (f"{_BASE}/input_layernorm/ELEMENTWISE_SUM_0 + {_BASE}/input_layernorm/ELEMENTWISE_PROD_0", "Myelin"),
    (f"{_BASE}/attention/qkv/PLUGIN_V2_Gemm_0", "PluginV2"),
    (f"{_BASE}/attention/wrapper_L562/gpt_attention_L5483/PLUGIN_V2_GPTAttention_0", "PluginV3"),
    (f"{_BASE}/mlp/ELEMENTWISE_PROD_0 + {_BASE}/mlp/ACTIVATION_SIGMOID_0 + {_BASE}/mlp/ELEMENTWISE_PROD_1", "Myelin"),
    ("LlamaForCausalLM/lm_head/PLUGIN_V2_Gemm_0", "PluginV2"),
)


def _layer(name: str, kind: str) -> dict:
    if os.environ.get("STANDIN_INSPECTOR") == "11":
        tensor: dict = {"Name": f"{name}_output_0", "Dimensions": [-1, 256], "Format": "Row-Major", "Datatype": "Half"}
    else:
        tensor = {
            "Name": f"{name}_output_0",
            "Dimensions": [-1, 256],
            "Format/Datatype": "Row major linear FP16 format",
        }
    return {"Name": name, "LayerType": kind, "Inputs": [], "Outputs": [tensor], "TacticName": "", "StreamId": 0}
