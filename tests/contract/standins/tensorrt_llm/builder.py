"""Stand-in. Source: tensorrt_llm/builder.py. BuildConfig in both forms: a dataclass until pull request 8330 (October
2025), a pydantic model since; 1.2.1 most likely has the second."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, create_model

from .plugin import PluginConfig

_FIELDS: dict = {
    "max_input_len": (int, 1024),
    "max_seq_len": (int | None, None),
    "opt_batch_size": (int, 8),
    "max_batch_size": (int, 2048),
    "max_beam_width": (int, 1),
    "max_num_tokens": (int, 8192),
    "opt_num_tokens": (int | None, None),
    "max_prompt_embedding_table_size": (int, 0),
    "kv_cache_type": (Any, None),
    "gather_context_logits": (int, False),
    "gather_generation_logits": (int, False),
    "strongly_typed": (bool, True),
    "force_num_profiles": (int | None, None),
    "profiling_verbosity": (str, "layer_names_only"),
    "enable_debug_output": (bool, False),
    "max_draft_len": (int, 0),
    "speculative_decoding_mode": (Any, None),
    "use_refit": (bool, False),
    "input_timing_cache": (str | None, None),
    "output_timing_cache": (str | None, "model.cache"),
    "weight_sparsity": (bool, False),
    "weight_streaming": (bool, False),
    "use_strip_plan": (bool, False),
    "max_encoder_input_len": (int, 1024),
    "dry_run": (bool, False),
    "visualize_network": (str | None, None),
    "monitor_memory": (bool, False),
    "use_mrope": (bool, False),
}


def _build_config() -> Any:
    if os.environ.get("STANDIN_BUILD_CONFIG") == "dataclass":
        fields = [(n, kind, dataclasses.field(default=default)) for n, (kind, default) in _FIELDS.items()]
        plugins = ("plugin_config", PluginConfig, dataclasses.field(default_factory=PluginConfig))
        return dataclasses.make_dataclass("BuildConfig", [*fields, plugins])
    plugins = (PluginConfig, Field(default_factory=PluginConfig))
    config = ConfigDict(extra="forbid", validate_assignment=True)
    return create_model("BuildConfig", __config__=config, **_FIELDS, plugin_config=plugins)


BuildConfig: Any = _build_config()


def as_dict(config: Any) -> dict:
    """What config.json holds of a build config: dry_run and visualize_network are no traits of an engine."""
    names = [n for n in _FIELDS if n not in ("dry_run", "visualize_network")]
    return {**{n: getattr(config, n) for n in names}, "plugin_config": config.plugin_config.model_dump()}


class EngineConfig:
    """config.json of an engine has exactly three keys."""

    def __init__(self, pretrained_config: dict, build_config: dict, version: str):
        self.pretrained_config, self.build_config, self.version = pretrained_config, build_config, version

    @classmethod
    def from_json_file(cls, config_file: str) -> "EngineConfig":
        fields = json.loads(Path(config_file).read_text())
        return cls(fields["pretrained_config"], fields["build_config"], fields["version"])


class Engine:
    def __init__(self, config: EngineConfig, engine: Any, managed_weights: Any = None):
        self.config, self.engine = config, engine

    @classmethod
    def from_dir(cls, engine_dir: str, rank: int = 0) -> "Engine":
        config = EngineConfig.from_json_file(str(Path(engine_dir) / "config.json"))
        return cls(config, (Path(engine_dir) / f"rank{rank}.engine").read_bytes())
