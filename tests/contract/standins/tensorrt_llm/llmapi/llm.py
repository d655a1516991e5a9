"""Stand-in. Source: tensorrt_llm/llmapi/llm.py, llm_utils.py, executor/result.py.

It "builds" by writing an engine folder in the recorded layout, and "generates" by counting up (see standin.py).
"""

import asyncio
import json
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from standin import answer, fail

from ..builder import BuildConfig, as_dict
from ..quantization import CALIBRATED, KV_CACHE
from ..sampling_params import SamplingParams
from .llm_args import TORCH_ARGS, TRT_ARGS, TRT_ONLY

HUB = ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "HuggingFaceTB/SmolLM2-135M-Instruct")  # what the stand-in's "Hub" has
MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_DTYPES = ("auto", "float32", "float16", "bfloat16")
_alive: "weakref.WeakSet[BaseLLM]" = weakref.WeakSet()


@dataclass
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: Any = None
    generation_logits: Any = None
    disaggregated_params: Any = None
    request_perf_metrics: Any = None
    _last_token_ids_len: int = 0
    _last_text_len: int = 0

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def token_ids_diff(self) -> list:
        return self.token_ids[self._last_token_ids_len :]

    @property
    def text_diff(self) -> str:
        return self.text[self._last_text_len :]


class RequestOutput:
    def __init__(self) -> None:
        raise RuntimeError("RequestOutput is designed to be instantiated using RequestOutput._from_generation_result")

    @classmethod
    def _start(cls, llm: "BaseLLM", prompt: Any, ids: list, params: SamplingParams, streaming: bool) -> "RequestOutput":
        self = cls.__new__(cls)
        self.request_id, self.prompt, self.prompt_token_ids = llm._count, prompt, ids
        self.outputs, self.finished, self.context_logits = [CompletionOutput(0)], False, None
        self._llm, self._params, self._streaming = llm, params, streaming
        ends = [] if params.ignore_eos else [params.end_id, *(params.stop_token_ids or [])]
        self._tokens, self._reason = answer(ids, params.max_tokens, ends, llm._vocab_size)
        return self

    def _step(self) -> None:
        fail("generate")
        output = self.outputs[0]
        count = 1 if self._streaming else len(self._tokens)
        output._last_token_ids_len, output._last_text_len = len(output.token_ids), len(output.text)
        output.token_ids = self._tokens[: len(output.token_ids) + count]
        if len(output.token_ids) == len(self._tokens):
            self.finished, output.finish_reason = True, self._reason
            if self._params.return_generation_logits:
                output.generation_logits = self._llm._logits(self.prompt_token_ids)
        if self._params.detokenize and self._llm.tokenizer is not None:
            output.text = self._llm.tokenizer.decode(output.token_ids, skip_special_tokens=True)

    def result(self, timeout: float | None = None) -> "RequestOutput":
        while not self.finished:
            self._step()
        return self

    async def aresult(self) -> "RequestOutput":
        await asyncio.sleep(0)
        return self.result()

    def __await__(self) -> Any:
        return self.aresult().__await__()

    def __iter__(self) -> "RequestOutput":
        return self

    def __next__(self) -> "RequestOutput":
        if self.finished:
            raise StopIteration
        self._step()
        return self

    def __aiter__(self) -> "RequestOutput":
        return self

    async def __anext__(self) -> "RequestOutput":
        await asyncio.sleep(0)
        if self.finished:
            raise StopAsyncIteration
        self._step()
        return self


class BaseLLM:
    _args: set = set()

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ):
        for key in kwargs:
            if key not in self._args:
                raise ValueError(f"{self.__class__.__name__} got invalid argument: {key}")
        if os.environ.get("STANDIN_MPI") == "broken" and os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS") != "1":
            raise RuntimeError("There are not enough slots available in the system")  # a notebook on Kaggle, issue 5854
        if any(other is not self and other._running for other in _alive):
            raise RuntimeError("stand-in: two live executors on one GPU hang, says a user of 1.2.1")
        assert dtype in _DTYPES, dtype
        if tensor_parallel_size > 1:
            raise RuntimeError(f"Only 1 GPUs are available, but {tensor_parallel_size} are required.")
        self.args, self._count, self._running = kwargs, 0, False
        self._model, self._dtype = str(model), dtype
        self._single = (tokenizer, skip_tokenizer_init)
        self._engine_dir: Path | None = None
        self.tokenizer = None
        self._build_model()
        self._running = True
        _alive.add(self)

    def _build_model(self) -> None:
        raise NotImplementedError

    def _read_model(self) -> tuple:
        """The format (engine, checkpoint or hf), the folder, and config.json, as get_model_format decides."""
        if self._model in HUB:  # "downloaded"
            return "hf", None, {"architectures": ["LlamaForCausalLM"], "vocab_size": 32000}
        folder = Path(self._model)
        if not folder.is_dir():
            raise OSError(f"{self._model} is not a local folder and is not a valid model identifier listed on the Hub")
        if not (folder / "config.json").exists():
            raise ValueError(f"Failed to infer model format because no config.json exists in {folder}")
        config = json.loads((folder / "config.json").read_text())
        if {"pretrained_config", "build_config"} <= config.keys():
            return "engine", folder, config
        return ("checkpoint" if {"architecture", "dtype"} <= config.keys() else "hf"), folder, config

    def _load_tokenizer(self, folder: Path | None) -> Any:
        tokenizer, skip = self._single
        if skip:
            return None
        if tokenizer is None and folder is not None and not (folder / "tokenizer.json").exists():
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(tokenizer or self._model))

    def _logits(self, prompt: list) -> Any:
        """Shape [tokens, V]: the only large score is the next token's."""
        import torch
        from standin import following

        scores = torch.zeros(1, self._vocab_size)
        scores[0, following(prompt[-1], self._vocab_size)] = 1.0
        return scores

    def generate(
        self,
        inputs: Any,
        sampling_params: Any = None,
        use_tqdm: bool = True,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: Any = None,
    ) -> Any:
        single = not isinstance(inputs, list) or isinstance(inputs[0], int)
        futures = [self.generate_async(i, sampling_params) for i in ([inputs] if single else inputs)]
        for future in futures:
            future.result()
        return futures[0] if single else futures

    def generate_async(
        self,
        inputs: Any,
        sampling_params: Any = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: Any = None,
    ) -> RequestOutput:
        if not self._running:
            raise RuntimeError("LLM is shutting down")
        params = sampling_params or SamplingParams()
        if not isinstance(params, SamplingParams):
            raise TypeError(f"The sampling_params must be type SamplingParams or None, but got {type(params)}")
        if params.end_id is None:
            if self.tokenizer is None:
                raise ValueError(
                    "tokenizer is required to reset end_id if it is None, or you can explicitly specify the end_id for "
                    "sampling_params"
                )
            params.end_id = self.tokenizer.eos_token_id
            params.pad_id = self.tokenizer.pad_token_id
        prompt = None
        if isinstance(inputs, dict):
            inputs = inputs.get("prompt", inputs.get("prompt_token_ids"))
        if isinstance(inputs, str):
            prompt, inputs = inputs, self.tokenizer.encode(inputs)
        elif not isinstance(inputs, list):
            raise TypeError(f"The inputs must be type str or list of int, but got {type(inputs)}")
        self._check_arguments(len(inputs), params)
        self._count += 1
        return RequestOutput._start(self, prompt, inputs, params, streaming)

    def _check_arguments(self, prompt_len: int, params: SamplingParams) -> None:
        raise NotImplementedError

    def get_stats(self, timeout: float = 2) -> list:
        return []

    def shutdown(self) -> None:
        self._running = False

    def __enter__(self) -> "BaseLLM":
        return self

    def __exit__(self, *_: Any) -> bool:
        self.shutdown()
        return False

    def __getstate__(self) -> Any:
        raise RuntimeError("LLM object can not be pickled.")


class _TrtLLM(BaseLLM):
    _args = TRT_ARGS

    def _build_model(self) -> None:
        form, folder, config = self._read_model()
        cache = self.args.get("kv_cache_config")
        assert cache is None or cache.dtype == "auto", "KvCacheConfig.dtype is not supported by the TensorRT backend."
        if form == "engine":
            fail("load")
            self._engine_dir = folder
        else:
            fail("build")
            self._workspace = tempfile.TemporaryDirectory(suffix="-llm-workspace", dir=self.args.get("workspace"))
            self._engine_dir = Path(self._workspace.name) / "tmp.engine"
            self._write_engine(form, config)
        written = json.loads((self._engine_dir / "config.json").read_text())
        self._build = written["build_config"]
        self._vocab_size = written["pretrained_config"]["vocab_size"]
        self.tokenizer = self._load_tokenizer(folder)
        if self.args.get("gather_generation_logits") and not self._build["gather_generation_logits"]:
            raise RuntimeError("stand-in: the engine was built without gather_generation_logits")

    def _write_engine(self, form: str, config: dict) -> None:
        build = self.args.get("build_config") or BuildConfig()
        if not isinstance(build, BuildConfig):
            raise ValueError(f"build_config is not set yet: {build}")
        architecture = config["architecture"] if form == "checkpoint" else config["architectures"][0]
        assert architecture in MODELS, f"Unsupported model architecture: {architecture}"
        quant = self.args.get("quant_config")
        algo = getattr(quant, "quant_algo", None)
        cache = getattr(quant, "kv_cache_quant_algo", None)
        assert cache is None or cache in KV_CACHE
        if algo in CALIBRATED and self.args.get("load_format") != "dummy" and self.args.get("calib_config") is None:
            raise ConnectionError("stand-in: calibration downloads cnn_dailymail, and this machine is offline")
        plugins = build.plugin_config
        if plugins.gemm_swiglu_plugin is not None and not plugins.use_fused_mlp:
            raise RuntimeError("GemmSwiGLU plugin requires --use_fused_mlp flag")
        self._engine_dir.mkdir()
        fields = {
            "version": __import__("tensorrt_llm").__version__,
            "pretrained_config": {
                "architecture": architecture,
                "dtype": self._dtype,
                "vocab_size": config["vocab_size"],
                "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
                "quantization": {"quant_algo": algo, "kv_cache_quant_algo": cache},
            },
            "build_config": as_dict(build),
        }
        (self._engine_dir / "config.json").write_text(json.dumps(fields, default=str))
        names = fields["build_config"]["profiling_verbosity"] != "detailed"
        (self._engine_dir / "rank0.engine").write_text(json.dumps({"plan": "stand-in", "names_only": names}))
        Path(fields["build_config"]["output_timing_cache"]).write_bytes(b"timing cache")

    def _check_arguments(self, prompt_len: int, params: SamplingParams) -> None:
        limit = self._build["max_seq_len"]
        if limit and prompt_len + params.max_tokens > limit:
            raise ValueError(
                f"The sum of prompt length ({float(prompt_len)}) and query length (0) max_tokens ({params.max_tokens}) "
                f"should not exceed max_seq_len ({limit})"
            )
        if params.best_of > self._build["max_batch_size"]:
            raise ValueError(
                f"sampling_params.n ({params.n}) cannot exceed max_batch_size ({self._build['max_batch_size']}) when "
                "use_beam_search is False"
            )
        if params.return_generation_logits and not self.args.get("gather_generation_logits"):
            raise ValueError(
                "requires `gather_generation_logits=True` to be passed explicitly to the `LLM()` constructor."
            )

    def save(self, engine_dir: str) -> None:
        if self._engine_dir is None:
            raise RuntimeError("The engine is not built yet.")
        if self._engine_dir.absolute() == Path(engine_dir).absolute():
            return
        shutil.copytree(self._engine_dir, engine_dir, dirs_exist_ok=True)


class _TorchLLM(BaseLLM):
    _args = TORCH_ARGS

    def __init__(self, model: Any, *positional: Any, **kwargs: Any):
        kwargs.pop("backend", "pytorch")
        wrong = sorted(set(kwargs) & TRT_ONLY)
        if wrong:
            raise ValueError(
                "The following arguments are specific to TensorRT backend and cannot be used with PyTorch backend: "
                f"{wrong}.\nPlease use 'from tensorrt_llm._tensorrt_engine import LLM' instead."
            )
        super().__init__(model, *positional, **kwargs)

    def _build_model(self) -> None:
        fail("load")
        form, folder, config = self._read_model()
        assert form == "hf", "stand-in: an engine folder given to the PyTorch class, issue 8223"
        self._vocab_size = config["vocab_size"]
        self.tokenizer = self._load_tokenizer(folder)

    def _check_arguments(self, prompt_len: int, params: SamplingParams) -> None:
        limit = self.args.get("max_num_tokens") or 8192
        if prompt_len > limit:
            raise ValueError(
                f"The sum of prompt length ({float(prompt_len)}), query length (0) should not exceed max_num_tokens "
                f"({limit})"
            )


class LLM(_TorchLLM):
    """tensorrt_llm.LLM: the PyTorch backend since 1.0. It has no `save`."""
