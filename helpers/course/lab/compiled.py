"""A module compiled by Inductor in a notebook's cell: the compiler of the `aot` engines, in seconds instead of a build.

    compiled = compile_module(module, (x,))
    compiled(x)                                      # what module(x) gives
    compiled.report.kernels[0].details["code"]       # the generated C++ or Triton
    compiled.targets                                 # what its machine code is for (binary.py)

Each kernel is a function of its own, so that torch.profiler can time it (profile.py).
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from helpers.backends.aot.compile import compiling
from helpers.backends.aot.recorder import TIMED, InductorRecorder, kernels_apart, whole_stack_traces
from helpers.backends.report import EngineReport
from helpers.course.lab.binary import compiled_for
from helpers.errors import InputError, need, shown
from helpers.machine import hardware
from helpers.machine.inductor import one_thread, prepare_inductor
from helpers.paths import owned_folder
from helpers.progress import shown_if_slow


@dataclass(frozen=True)
class Compiled:
    run: Any
    inputs: str  # what it is compiled for, in words
    report: EngineReport
    targets: Counter[str]

    def __call__(self, *inputs: Any) -> Any:
        """InputError for other inputs than those it is compiled for: the machine code reads their memory as it lay
        then, and would not notice."""
        if (given := _described(inputs)) != self.inputs:
            raise InputError(
                f"This module is compiled for {self.inputs}, and is given {given or 'nothing'}.",
                fix="Give inputs like those, or compile it again with these: compile_module(module, inputs).",
            )
        with torch.no_grad():
            return self.run(*inputs)


def _described(inputs: Sequence[Any]) -> str:
    """Inputs in words: those of tensors say all that compiled code takes for granted, and nothing of their numbers."""
    return ", ".join(map(_kind, inputs))


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {_kind(item)}' for name, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"({_described(value)})"
    if not isinstance(value, Tensor):
        return shown(value)
    strides = "" if value.is_contiguous() else f" with strides {value.stride()}"
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}{strides}"


def compile_module(
    module: nn.Module, inputs: Sequence[Any], *, fusion: bool = True, options: dict[str, Any] | None = None
) -> Compiled:
    """fusion=False: each operation writes its result to memory. options: Inductor's, such as {"cpp.simdlen": 256}."""
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list
    from torch._inductor.utils import fresh_cache

    need(module, nn.Module, "Give a module, such as nn.GELU().")
    if not isinstance(inputs, (list, tuple)):
        raise InputError(f"A module's inputs are a tuple, not {shown(inputs)}.", fix="Give one alone as (x,).")
    if unknown := set(options or {}) - set(torch._inductor.list_options()):
        near = difflib.get_close_matches(min(unknown), torch._inductor.list_options(), n=1)
        fix = f"Did you mean {near[0]!r}?" if near else "torch._inductor.list_options() has their names."
        raise InputError(f"Inductor has no option {min(unknown)!r}.", fix=fix)
    # torch.export takes one tensor that is given twice for one input.
    inputs = [
        v.clone() if isinstance(v, Tensor) and any(v is w for w in inputs[:n]) else v for n, v in enumerate(inputs)
    ]
    with shown_if_slow("Compiling the module", "export"), one_thread, whole_stack_traces():
        try:
            program = torch.export.export(module, tuple(inputs), strict=False)
        except Exception as error:  # the learner's module, so any
            words = f"PyTorch cannot export the module with these inputs: {' '.join(str(error).split()):.300}"
            raise InputError(words, fix="Give inputs that module(*inputs) takes; no branch on their values.") from error
    recorder = InductorRecorder("module", program.graph)
    settings: dict[str, Any] = {**recorder.options(), "cpp.threads": 1, **TIMED}
    settings["cpp.cxx"] = (None, hardware.compiler())
    if not fusion:
        settings |= {"max_fusion_size": 1, "post_grad_custom_pre_pass": _keep_every_result}
    place = prepare_inductor()
    with shown_if_slow("Trying the processor's vector instructions", "compile"), one_thread:
        valid_vec_isa_list()  # once in a process, by libraries that would lie and count among the module's
    with (
        shown_if_slow("Compiling the module", "compile"),
        one_thread,
        torch.no_grad(),
        owned_folder("course-lab-", place) as folder,
        fresh_cache(dir=str(folder)),
        warnings.catch_warnings(),
        kernels_apart(),
        compiling("the module"),
    ):
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # here fp32 means fp32
        graph = program.module()
        try:
            inductor = torch._inductor.compile(graph, list(inputs), options={**settings, **(options or {})})
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise InputError(
                f"A size or a number depends on the inputs' values ({error.func}), and nothing can be compiled for it.",
                fix="torch.where(mask, x, 0) in place of x[mask], tensors in place of .item().",
            ) from error
        inductor(*inputs)  # the last of the compilers is done
        files = [path for path in folder.rglob("*") if path.is_file()]
        texts = (path.read_text(encoding="utf-8") for path in files if path.suffix == ".py")
        programs = [text for text in texts if " def call(" in text]
        if len(programs) != 1:
            raise InputError(
                f"PyTorch's compiler wrote {len(programs)} Python programs; one is what is looked into here.",
                cause="The module hands its inputs on, or an option (cpp_wrapper, trace.enabled) changes this.",
                fix="Give a module that computes something, and leave such options out.",
            )
        # Beside a GPU's kernels, the libraries are what starts them.
        kinds = [[path for path in files if path.suffix == kind] for kind in (".cubin", ".so")]
        targets = sum(map(compiled_for, kinds[0] or kinds[1]), Counter())
    return Compiled(inductor, _described(inputs), _with_code(recorder.report(), programs[0]), targets)


def _keep_every_result(graph: torch.fx.Graph) -> None:
    """Inductor reads as_strided's input from memory, so every result that has one behind it is written there."""
    keep = torch.ops.aten.as_strided.default
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and node.target is not keep:
            with graph.inserting_after(node):
                kept = graph.call_function(keep, (node, [*value.shape], [*value.stride()]))
            kept.meta["val"] = value
            node.replace_all_uses_with(kept, lambda user, kept=kept: user is not kept)


def _with_code(report: EngineReport, wrapper: str) -> EngineReport:
    """The report with each generated kernel's source, taken from the program that calls them in this order."""
    sources = dict(re.findall(r"^(\w+) = async_compile\.\w+\(.*?r?'''(.*?)'''", wrapper, re.DOTALL | re.MULTILINE))
    calls = iter(re.findall(rf"^\s+({'|'.join(sources) or '$^'})(?:\.run)?\(", wrapper, re.MULTILINE))
    kernels = [
        replace(k, details={**k.details, "code": sources[next(calls)]}) if k.kind == "generated" else k
        for k in report.kernels
    ]
    return replace(report, kernels=kernels)
