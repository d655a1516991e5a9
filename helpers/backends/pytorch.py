"""The `pytorch` and `torch_compile` backends: transformers' own model, eager or compiled just in time.

They are what the engine is compared with, so they run the model as a user of transformers would: eager with a growing
cache, or `torch.compile` over a static cache. Nothing of the course's own decoder is in them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from helpers.backends.base import Engine
from helpers.errors import BackendUnavailable, BuildError, ModelError, OutOfMemory, out_of_memory
from helpers.machine import doctor, hardware
from helpers.machine.inductor import prepare_inductor
from helpers.model.checkpoint import INDEX, Checkpoint, find_checkpoint
from helpers.model.config import transformers_config
from helpers.model.tokenizer import load_tokenizer
from helpers.progress import shown_if_slow
from helpers.recipe import BuildRecipe

# torch gives up on a function that it has compiled eight times, for all batch sizes and all models together.
NO_LIMITS = {"recompile_limit": 1 << 30, "accumulated_recompile_limit": 1 << 30}
_loads = threading.Lock()  # transformers changes itself and torch while it loads, for all threads
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_available() -> None:
    """It runs wherever PyTorch does."""


def load(recipe: BuildRecipe) -> Engine:
    return TorchCompileEngine(recipe) if recipe.backend == "torch_compile" else PyTorchEngine(recipe)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Any:
    """transformers' model of a checkpoint, in evaluation mode; random weights where the checkpoint is a dummy."""
    from transformers import AutoModelForCausalLM, GenerationConfig, __version__

    config = transformers_config(checkpoint.folder)
    config.tie_word_embeddings = checkpoint.config.tie_word_embeddings
    # What config.json asks for is not passed on: an attention by name can mean code from the Hub.
    settings = {"dtype": dtype, "attn_implementation": "sdpa", "trust_remote_code": False}
    with _loads, _quiet():
        if checkpoint.dummy:
            # The user's random numbers go on as if no model had been loaded. Of a checkpoint's weights none is drawn.
            with torch.random.fork_rng(), torch.device(device):
                torch.manual_seed(0)
                return AutoModelForCausalLM.from_config(config, **settings).eval()
        files = {"use_safetensors": True, "local_files_only": True, "generation_config": GenerationConfig()}
        with torch.device("cpu"):  # a notebook may have set another as torch's default
            try:
                model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, config=config, **settings, **files)
            except (LookupError, TypeError, ValueError) as error:  # of files that the course itself can read
                cause = f"This transformers, {__version__}, may be of another version than the course needs."
                fix = "helpers doctor says which versions belong here. If it is content, save the model anew."
                if (checkpoint.folder / INDEX).exists():
                    cause = 'It asks for more than the weights: that their index has a table "metadata", say.'
                    fix = 'Add "metadata": {} to model.safetensors.index.json, or save the model anew.'
                raise ModelError(
                    f"transformers does not read the weights of {checkpoint.folder.name!r}: "
                    f"{type(error).__name__}: {error!s:.200}.",
                    cause=cause,
                    fix=fix,
                ) from error
    return model.to(device).eval()


class PyTorchEngine(Engine):
    """transformers in eager mode. Prompts of a batch are padded on the left, as `generate` does it."""

    def __init__(self, recipe: BuildRecipe):
        with shown_if_slow(f"Loading {recipe.short_name}", "model"):  # the import of transformers, too
            checkpoint = find_checkpoint(recipe.model)
            checkpoint.check(recipe.max_seq_len)
            config = checkpoint.config
            super().__init__(recipe, load_tokenizer(checkpoint.folder), config.eos_token_ids, config.vocab_size)
            self.device = hardware.resolve_device(recipe.device)
            _check_memory(config.parameter_count() * DTYPES[recipe.precision].itemsize, self.device)
            self.model = load_model(checkpoint, DTYPES[recipe.precision], self.device)
        self.cache: Any = None
        self.mask = self.positions = torch.empty(0)

    def _guarded(self, phase: Callable[..., Any], *arguments: Any) -> Any:
        """transformers makes tensors without naming a device."""
        with contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
            return super()._guarded(phase, *arguments)

    @torch.inference_mode()
    def _prefill(self, prompts: list[list[int]]) -> Tensor:
        longest = max(map(len, prompts))
        # Filled up with a token of its own: another one's numbers could be too large, and NaN passes any mask.
        padded = [prompt[:1] * (longest - len(prompt)) + prompt for prompt in prompts]
        ids = torch.tensor(padded, device=self.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.mask = (torch.arange(longest, device=self.device) >= longest - lengths[:, None]).long()
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        self.positions = positions[:, -1:]
        self.cache = self.new_cache(len(prompts))
        return self.forward(ids, positions)

    @torch.inference_mode()
    def _decode(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], -1)
        self.positions = self.positions + 1
        return self.forward(tokens[:, None].to(self.device), self.positions)

    def new_cache(self, batch: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache()

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float()

    def _release(self) -> None:
        self.model = self.cache = None
        if self.device == "cuda":
            torch.cuda.empty_cache()


class TorchCompileEngine(PyTorchEngine):
    """The same model with `torch.compile` and a static cache: decode is compiled at its first call.

    On a GPU mode "reduce-overhead" records the compiled step as a CUDA graph.
    """

    in_use: ClassVar[WeakSet[TorchCompileEngine]] = WeakSet()

    def __init__(self, recipe: BuildRecipe):
        super().__init__(recipe)
        self.compiles = torch.compile(torch.compiler.is_compiling)
        self._check_compiles()
        prepare_inductor()
        mode = "reduce-overhead" if self.device == "cuda" else "default"
        self.compiled: Any = torch.compile(self.model.forward, mode=mode, fullgraph=True, dynamic=False)
        self.caches: dict[int, Any] = {}
        self.compiled_for: set[tuple[int, int]] = set()  # batch sizes, with how many threads
        self.in_use.add(self)

    def _check_compiles(self) -> None:
        """Asked for each request: a notebook can switch it off at any time."""
        with torch._dynamo.config.patch(NO_LIMITS):
            compiles = self.compiles()
        if not compiles:
            raise BackendUnavailable(
                "torch.compile is switched off here, so this backend would run the eager model under another name.",
                cause="TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE is set, or torch.compiler.set_stance was called.",
                fix="Unset it and start Python again, or use backend='pytorch'.",
            )

    def new_cache(self, batch: int) -> Any:
        from transformers import StaticCache

        self._check_compiles()
        if batch not in self.caches:  # one cache a batch size: a new one would be compiled for again
            self.caches[batch] = StaticCache(config=self.model.config, max_cache_len=self.recipe.max_seq_len)
        self.caches[batch].reset()
        return self.caches[batch]

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        mask, length = self.mask, self.mask.shape[1]
        decodes = length > ids.shape[1]  # a prompt of one token is read as any other
        if decodes:  # static shape: the mask covers the whole cache
            mask = torch.nn.functional.pad(mask, (0, self.recipe.max_seq_len - mask.shape[1]))
        if self.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": self.cache}
        given |= {"use_cache": True, "logits_to_keep": 1, **self._cache_position(length, ids)}
        size = len(ids), torch.get_num_threads()
        with self._compiling(size) if decodes and size not in self.compiled_for else contextlib.nullcontext():
            out = self.compiled(**given) if decodes else self.model.forward(**given)
        return out.logits[:, -1].float().clone()

    @contextlib.contextmanager
    def _compiling(self, size: tuple[int, int]) -> Iterator[None]:
        """Around the first step of its size, which is compiled whatever a notebook has set."""
        shown = shown_if_slow(f"torch.compile: the step for a batch of {size[0]}", "compile")
        try:
            with shown, torch.compiler.set_stance("default"), torch._dynamo.config.patch(NO_LIMITS):
                yield
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = error.inner_exception
            words = next(iter(str(reason).splitlines()), type(reason).__name__)
            failed = BuildError(f"torch.compile cannot compile this model here: {words}")
            raise out_of_memory(reason) or doctor.named_cause(failed) from error
        self.compiled_for.add(size)

    def _cache_position(self, length: int, ids: Tensor) -> dict[str, Tensor]:
        """transformers 4.57 wants the cache slots that this call fills; 5.x counts them itself."""
        import transformers

        if int(transformers.__version__.split(".")[0]) >= 5:
            return {}
        return {"cache_position": torch.arange(length - ids.shape[1], length, device=ids.device)}

    def _release(self) -> None:
        super()._release()
        self.compiled, self.caches = None, {}
        self.in_use.discard(self)
        if not self.in_use:  # else another engine's steps would be compiled again, while somebody times them
            torch._dynamo.reset()


def _check_memory(size: int, device: str) -> None:
    """OutOfMemory before anything is loaded: afterwards the system would end this process, or hang."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else hardware.free_memory()
    if size > free:
        raise OutOfMemory(
            f"The weights take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.",
            cause="This model is too large for this machine in this precision.",
            fix="Close other engines, choose bf16, or take a smaller model.",
        )


@contextlib.contextmanager
def _quiet():
    """No progress bar for the fraction of a second that loading takes; errors still show."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
