"""Programmatic dependent launch: in a CUDA graph, a kernel starts before the one that it waits for has ended.

Between two kernels a GPU's memory is idle for a microsecond or two: the last programs of one end, then the first of
the next start and ask for their weights. A decode step has some hundred kernels, so this is a tenth of its time. From
Hopper on (compute capability 9.0) a kernel can start as soon as the one before leaves room, load what does not depend
on it, and then wait for it: https://docs.nvidia.com/cuda/cuda-programming-guide/04-special-topics/programmatic-dependent-launch.html

Our kernels are written for that (gpu_kernels.py), and their names say so. The launcher that AOTInductor generates
cannot ask for it. So what it recorded as a CUDA graph is edited before the graph is instantiated: an edge between two
such kernels becomes a programmatic one.
"""

from __future__ import annotations

import ctypes as c
from functools import cache

from helpers.errors import BackendUnavailable

CAPABILITY = (9, 0)  # the least that has it
PREFIX = "_early_"  # of a kernel that waits, before it reads what another has written


class _Edge(c.Structure):
    """CUgraphEdgeData of cuda.h."""

    _fields_ = [("from_port", c.c_ubyte), ("to_port", c.c_ubyte), ("type", c.c_ubyte), ("reserved", c.c_ubyte * 5)]


class _KernelNode(c.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2 of cuda.h."""

    _fields_ = [
        ("function", c.c_void_p),
        ("sizes", c.c_uint * 7),  # grid, block, shared memory
        ("parameters", c.c_void_p),
        ("extra", c.c_void_p),
        ("kernel", c.c_void_p),
        ("context", c.c_void_p),
    ]


# Constants of cuda.h: CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC, CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC, and
# CU_GRAPH_NODE_TYPE_KERNEL.
PROGRAMMATIC = _Edge(from_port=1, type=1)
KERNEL = 0


def start_early(graph: int) -> int:
    """Edit a recorded CUDA graph (a cudaGraph_t, not instantiated yet). Returns how many edges became programmatic."""
    count = c.c_size_t()
    _call("cuGraphGetEdges_v2", c.c_void_p(graph), None, None, None, c.byref(count))
    before, after, edges = (c.c_void_p * count.value)(), (c.c_void_p * count.value)(), (_Edge * count.value)()
    _call("cuGraphGetEdges_v2", c.c_void_p(graph), before, after, edges, c.byref(count))
    changed = 0
    for first, second in zip(before, after, strict=True):
        if list(after).count(second) == 1 and _starts_early(first) and _starts_early(second):
            nodes = (c.c_void_p * 1)(first), (c.c_void_p * 1)(second)
            _call("cuGraphRemoveDependencies_v2", c.c_void_p(graph), *nodes, None, c.c_size_t(1))
            _call("cuGraphAddDependencies_v2", c.c_void_p(graph), *nodes, c.byref(PROGRAMMATIC), c.c_size_t(1))
            changed += 1
    return changed


def _starts_early(node: int) -> bool:
    """Whether a node of a graph is a kernel whose name says that it waits by itself."""
    kind = c.c_int()
    _call("cuGraphNodeGetType", c.c_void_p(node), c.byref(kind))
    if kind.value != KERNEL:
        return False
    launch, name = _KernelNode(), c.c_char_p()
    _call("cuGraphKernelNodeGetParams_v2", c.c_void_p(node), c.byref(launch))
    if not launch.function:  # a kernel of a library: known by `kernel` alone
        return False
    _call("cuFuncGetName", c.byref(name), c.c_void_p(launch.function))
    return (name.value or b"").startswith(PREFIX.encode())


def _call(function: str, *arguments: object) -> None:
    if code := getattr(_driver(), function)(*arguments):
        raise BackendUnavailable(
            f"NVIDIA's driver refuses {function}: error {code}.",
            cause="The driver is older than CUDA 12.4, or the GPU is in use by a process that failed.",
            fix="Update the driver, then start Python again.",
        )


@cache
def _driver() -> c.CDLL:
    return c.CDLL("libcuda.so.1")
