"""Stand-in. Source: tensorrt_llm/runtime/generation.py (SamplingConfig), model_runner.py, model_runner_cpp.py."""

import copy
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from standin import answer, fail

from ..builder import EngineConfig

PYTHON_BINDINGS = True


@dataclass
class SamplingConfig:
    """end_id and pad_id have no default."""

    end_id: int
    pad_id: int
    max_new_tokens: int = field(default=20)
    num_beams: int = field(default=1)
    num_return_sequences: int | None = field(default=None)
    max_attention_window_size: int | None = field(default=None)
    sink_token_length: int | None = field(default=None)
    output_sequence_lengths: bool = field(default=False)
    return_dict: bool = field(default=False)
    stop_words_list: Any = field(default=None)
    bad_words_list: Any = field(default=None)
    temperature: Any = field(default=1.0)
    top_k: Any = field(default=1)
    top_p: Any = field(default=0.0)
    top_p_decay: Any = field(default=None)
    top_p_min: Any = field(default=None)
    top_p_reset_ids: Any = field(default=None)
    random_seed: Any = field(default=None)
    length_penalty: Any = field(default=1.0)
    early_stopping: Any = field(default=1)
    repetition_penalty: Any = field(default=1.0)
    min_length: Any = field(default=1)
    presence_penalty: Any = field(default=0.0)
    frequency_penalty: Any = field(default=0.0)
    use_beam_hyps: bool = field(default=True)
    min_p: Any = field(default=0.0)
    beam_search_diversity_rate: Any = field(init=False, default=0.0)
    output_cum_log_probs: bool = field(init=False, default=False)
    output_log_probs: bool = field(init=False, default=False)
    no_repeat_ngram_size: Any = field(init=False, default=None)

    def update(self, **kwargs: Any) -> dict:
        known = {f.name for f in fields(self)}
        for name in known & kwargs.keys():
            setattr(self, name, kwargs[name])
        return {name: value for name, value in kwargs.items() if name not in known}


class _Runner:
    def __init__(self, engine_dir: str):
        fail("walk")
        config = EngineConfig.from_json_file(str(Path(engine_dir) / "config.json"))  # FileNotFoundError if it is none
        json.loads((Path(engine_dir) / "rank0.engine").read_text())
        self._build, self._vocab_size = config.build_config, config.pretrained_config["vocab_size"]

    def _check_inputs(self, batch: list[torch.Tensor], new_tokens: int, beams: int = 1) -> None:
        longest = max(t.size(0) for t in batch)
        build, said = self._build, "exceeds the engine or specified limit"
        if len(batch) > build["max_batch_size"]:
            raise RuntimeError(f"Input batch size ({len(batch)}) {said} ({build['max_batch_size']})")
        if longest > build["max_input_len"]:
            raise RuntimeError(f"Maximum input length ({longest}) {said} ({build['max_input_len']})")
        if longest + new_tokens > build["max_seq_len"]:
            raise RuntimeError(
                f"Maximum input length ({longest}) + maximum new tokens ({new_tokens}) {said} ({build['max_seq_len']})"
            )
        if beams > build["max_beam_width"]:
            raise RuntimeError(f"Num beams ({beams}) {said} ({build['max_beam_width']})")

    def _generate(self, batch: list[torch.Tensor], count: int, end_id: int, pad_id: int) -> torch.Tensor:
        """Shape [batch, beams, tokens]; the prompt is part of it."""
        for ids in batch:
            assert ids.dim() == 1 and ids.dtype in (torch.int32, torch.int64)
        longest = max(t.size(0) for t in batch)
        rows = torch.full((len(batch), 1, longest + count), pad_id, dtype=torch.int32)
        for row, ids in zip(rows, batch, strict=True):
            tokens = ids.tolist()
            made, reason = answer(tokens, count, [end_id], self._vocab_size)
            made += [end_id] if reason == "stop" and end_id not in made else []
            row[0, : len(tokens) + len(made)] = torch.tensor(tokens + made)
        return rows


class ModelRunner(_Runner):
    @classmethod
    def from_dir(
        cls,
        engine_dir: str,
        *,
        max_output_len: int | None = None,
        lora_dir: list[str] | None = None,
        rank: int = 0,
        debug_mode: bool = False,
        lora_ckpt_source: str = "hf",
        medusa_choices: Any = None,
        stream: Any = None,
        gpu_weights_percent: float = 1,
        enable_context_fmha_fp32_acc: bool | None = None,
        multi_block_mode: bool | None = None,
        fail_fast_on_attention_window_too_large: bool = False,
    ) -> "ModelRunner":
        return cls(engine_dir)

    def generate(
        self,
        batch_input_ids: list[torch.Tensor],
        position_ids: Any = None,
        sampling_config: SamplingConfig | None = None,
        prompt_table: Any = None,
        prompt_tasks: str | None = None,
        lora_uids: list | None = None,
        streaming: bool = False,
        output_generation_logits: bool = False,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        medusa_choices: Any = None,
        encoder_max_input_length: Any = None,
        encoder_input_features: Any = None,
        encoder_output_lengths: Any = None,
        cross_attention_masks: Any = None,
        **kwargs: Any,
    ) -> Any:
        config = copy.deepcopy(sampling_config) or SamplingConfig(end_id=None, pad_id=None)  # type: ignore[arg-type]
        config.update(**kwargs)
        self._check_inputs(batch_input_ids, config.max_new_tokens, config.num_beams)
        if kwargs.get("num_return_sequences") is not None:
            raise ValueError("num_return_sequences will be ignored since ... Please use C++ runtime.")
        return self._generate(batch_input_ids, config.max_new_tokens, config.end_id, config.pad_id)


class ModelRunnerCpp(_Runner):
    @classmethod
    def from_dir(
        cls,
        engine_dir: str,
        *,
        lora_dir: str | None = None,
        rank: int = 0,
        max_batch_size: int | None = None,
        max_input_len: int | None = None,
        max_output_len: int | None = None,
        max_beam_width: int | None = None,
        max_attention_window_size: list | None = None,
        sink_token_length: int | None = None,
        kv_cache_free_gpu_memory_fraction: float | None = None,
        cross_kv_cache_fraction: float | None = None,
        medusa_choices: Any = None,
        eagle_choices: Any = None,
        debug_mode: bool = False,
        lora_ckpt_source: str = "hf",
        use_gpu_direct_storage: bool = False,
        gpu_weights_percent: float = 1,
        max_tokens_in_paged_kv_cache: int | None = None,
        kv_cache_enable_block_reuse: bool = False,
        enable_chunked_context: bool = False,
        is_enc_dec: bool = False,
        multi_block_mode: bool = True,
        enable_context_fmha_fp32_acc: bool | None = None,
        cuda_graph_mode: bool | None = None,
        logits_processor_map: Any = None,
        device_ids: Any = None,
        is_orchestrator_mode: bool = False,
        use_runtime_defaults: bool = True,
        gather_generation_logits: bool = False,
        use_variable_beam_width_search: bool = False,
        mm_embedding_offloading: bool = False,
        fail_fast_on_attention_window_too_large: bool = False,
    ) -> "ModelRunnerCpp":
        return cls(engine_dir)

    def generate(
        self,
        batch_input_ids: list[torch.Tensor],
        *,
        position_ids: Any = None,
        sampling_config: Any = None,
        lora_uids: list | None = None,
        lookahead_config: Any = None,
        streaming: bool = False,
        stopping_criteria: Any = None,
        logits_processor_names: Any = None,
        max_new_tokens: int = 1,
        end_id: int | None = None,
        pad_id: int | None = None,
        bad_words_list: Any = None,
        stop_words_list: Any = None,
        return_dict: bool = False,
        output_sequence_lengths: bool = False,
        output_generation_logits: bool = False,
        output_log_probs: bool = False,
        output_cum_log_probs: bool = False,
        prompt_table: Any = None,
        prompt_tasks: Any = None,
        **kwargs: Any,
    ) -> Any:
        if isinstance(sampling_config, SamplingConfig):
            raise TypeError("the C++ runner takes tensorrt_llm.bindings.executor.SamplingConfig")
        if end_id is None or pad_id is None:
            raise TypeError("stand-in: end_id and pad_id are read from the keywords only")
        self._check_inputs(batch_input_ids, max_new_tokens)
        return self._generate(batch_input_ids, max_new_tokens, end_id, pad_id)
