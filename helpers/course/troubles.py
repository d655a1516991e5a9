"""What notebooks 05 and 08 need to cause trouble without harm: copies to damage, machines that are pretended, and work
for a worker that ends badly."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import io
import json
import shutil
import socket
import statistics
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from helpers.errors import InputError
from helpers.model.checkpoint import find_checkpoint
from helpers.paths import full_is_told, named, owned_folder


@cache
def _scratch() -> Path:
    """It goes when Python ends; that of a kernel that was killed goes with the next."""
    folder = contextlib.ExitStack()
    atexit.register(folder.close)
    return folder.enter_context(owned_folder("course-trouble-"))


def _new_folder() -> Path:
    if not _scratch().is_dir():  # a system may clear it away while a kernel lives
        _scratch.cache_clear()
    return Path(tempfile.mkdtemp(dir=_scratch()))


@full_is_told()
def copy_of(folder: Path | str) -> Path:
    """A copy of an engine or checkpoint in a temporary folder of its own, to be damaged at will."""
    folder = named(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {str(folder)!r} to copy.", fix="Give what build(recipe) returned.")
    place = _new_folder()
    try:
        return Path(shutil.copytree(folder, place / folder.name))
    except BaseException:  # a half copy would keep a full disk full
        shutil.rmtree(place, ignore_errors=True)
        raise


@full_is_told()
def other_tokenizer(name: str = "stories") -> Path:
    """A copy of a checkpoint whose tokenizer numbers the same pieces in another order: each id moved up by one."""
    folder = copy_of(find_checkpoint(name).folder)
    path = folder / "tokenizer.json"
    if not path.exists():
        raise InputError(
            f"Checkpoint {name!r} has no tokenizer.json.", fix="Name one that has: other_tokenizer('stories')."
        )
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    special = {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"]["vocab"]
    ids = [i for i in sorted(vocabulary.values()) if i not in special]
    moved = dict(zip(ids, ids[1:] + ids[:1], strict=True))
    tokenizer["model"]["vocab"] = {piece: moved.get(i, i) for piece, i in vocabulary.items()}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return folder


@full_is_told()
def without_end_token(name: str = "stories") -> Path:
    """A copy of a checkpoint that says of no token that it ends a text."""
    folder = copy_of(find_checkpoint(name).folder)
    for path in filter(Path.exists, (folder / "config.json", folder / "generation_config.json")):
        fields = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**fields, "eos_token_id": None}), encoding="utf-8")
    return folder


@full_is_told()
def source_checkout(package: str) -> Path:
    """A folder that holds a package's Python files without its compiled ones, as a clone of its repository does."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"Package {package!r} is not installed here.", fix="Give one that is, such as 'safetensors'.")
    compiled = shutil.ignore_patterns("*.so", "*.pyd", "*.dylib", "__pycache__")
    folder = _new_folder() / "clone"
    shutil.copytree(Path(spec.origin).parent, folder / package, ignore=compiled)
    return folder


def wrong_scale(engine: Path | str, name: str, factor: float) -> Path:
    """A copy of an int8 `aot` engine in which one layer's scales are too large, as a faulty quantization leaves them:
    the manifest fits, because the fault was there before the engine was sealed."""
    from safetensors.torch import load_file, save_file

    from helpers import store

    folder = copy_of(engine)
    path = folder / "weights.safetensors"
    weights = load_file(path) if path.exists() else {}
    if f"{name}.scale" not in weights:
        names = ", ".join(key.removesuffix(".scale") for key in weights if key.endswith(".scale")) or "none: no int8"
        raise InputError(f"Engine {folder.name!r} has no scales of {name!r}.", fix=f"There are {names}.")
    save_file({**weights, f"{name}.scale": weights[f"{name}.scale"] * factor}, path)
    manifest = store.read_manifest(folder)
    manifest["files"][path.name] = store.entry_of(path)
    store.save_manifest(folder, manifest)
    return folder


@full_is_told()
def graph_with_plugin() -> Path:
    """An ONNX file of one node, which is one of TensorRT-LLM's plugins."""
    import onnx
    from onnx import helper

    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 64]) for name in "xy")
    node = helper.make_node("GPTAttention", ["x"], ["y"], name="attention", domain="tensorrt_llm")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("tensorrt_llm", 1)]
    path = _new_folder() / "attention.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "block", [x], [y]), opset_imports=opsets, ir_version=8), path)
    return path


@full_is_told()
def broken_compiler() -> Path:
    """A C++ compiler whose headers are gone: a shell script that says so."""
    path = _new_folder() / "g++"
    path.write_text("#!/bin/sh\necho 'probe.cpp:1: fatal error: string: No such file or directory' >&2\nexit 1\n")
    path.chmod(0o755)
    return path


def kill_beyond(megabytes: int, pid: int) -> None:
    """Play the kernel's part where it has a limit on memory: kill a process once it holds so much more than now."""
    process = psutil.Process(pid)
    limit = process.memory_info().rss + megabytes * 10**6

    def watch() -> None:
        with contextlib.suppress(psutil.Error):  # it has ended
            while process.memory_info().rss < limit:
                time.sleep(0.005)
            process.kill()

    threading.Thread(target=watch, daemon=True).start()


# What a worker is asked


def convert(megabytes: int, parts: int) -> str:
    """Convert weights of so many megabytes to half the size, all at once or one part after another."""
    import numpy as np

    size = 0
    for _ in range(parts):
        part = np.ones(megabytes * 10**6 // 4 // parts, dtype=np.float32)
        size += part.astype(np.float16).nbytes
        time.sleep(0.02)
    return f"{megabytes} MB in fp32 are {size / 1e6:.0f} MB in fp16"


def wait_for_partners(processes: int) -> str:
    """Wait until so many processes have met, this one among them, as MPI does when it starts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(processes - 1):
            server.accept()
    return "all here"


def seconds_per_token(threads: list[int]) -> dict[int, float]:
    """Seconds per token of PyTorch's eager model on the CPU with each number of threads: the median of 24 steps."""
    import torch

    from helpers.engine import load
    from helpers.model.sampling import SamplingParams
    from helpers.recipe import BuildRecipe

    seconds = {}
    with load(BuildRecipe(backend="pytorch", device="cpu")) as engine:
        for number in threads:
            torch.set_num_threads(number)
            answer = engine.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=25, ignore_eos=True))[0]
            seconds[number] = statistics.median(answer.metrics.gaps_s)
    return seconds


def generate_within(megabytes: int, batch_size: int, input_len: int) -> dict[str, Any]:
    """Answer a batch in this process, which may take only so many megabytes more than it has. Called in a worker:
    the limit stays until the process ends. Linux only."""
    import resource

    from helpers.engine import load
    from helpers.model.sampling import SamplingParams
    from helpers.recipe import BuildRecipe

    recipe = BuildRecipe(
        backend="pytorch", device="cpu", max_batch_size=batch_size, max_input_len=input_len, max_seq_len=256
    )
    with load(recipe) as engine:
        engine.generate([[1, 2]], SamplingParams(max_tokens=2))  # what is only loaded when first needed
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + megabytes * 10**6,) * 2)
        answers = engine.generate([[1] * input_len] * batch_size, SamplingParams(temperature=0, max_tokens=4))
    return {"answers": len(answers), "tokens": sum(len(answer.token_ids) for answer in answers)}


def build_small(size: int, room: int = 0) -> dict[str, Any]:
    """Build a TensorRT engine of one layer: its name, what the build told, and how many seconds it took. room: the most
    bytes that the system lets this process write into a file, as where a disk is full. Linux and macOS only."""
    import torch

    from helpers.engine import build_module

    if room:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    torch.manual_seed(0)  # the same weights in each process, and so the same engine
    start, told = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stderr(told):
        folder = build_module(torch.nn.Linear(size, size), (torch.ones(1, size),), precision="fp16", name="small")
    return {"name": folder.name, "told": told.getvalue().strip().split("\n"), "seconds": time.perf_counter() - start}


CALLS = {call.__name__: call for call in (generate_within, convert, wait_for_partners, seconds_per_token, build_small)}
