"""A graph on its way through Inductor, and what took each operation out of it that no kernel does.

Inductor shows the graph at a few public hooks. What nobody reads is dead from the start. Of anything else, the readers
tell: after the stage that took it out they read something else, and that is what stands in its place.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

HOOKS = ("joint_custom_pre_pass", "joint_custom_post_pass", "post_grad_custom_post_pass")
# Not work: they only rename, index or take apart what another operation made.
FREE = frozenset(
    "view reshape _unsafe_view permute transpose t slice select unsqueeze squeeze expand alias as_strided split "
    "split_with_sizes getitem detach sym_size sym_numel sym_stride full_like empty".split()
)
INPUTS = ("placeholder", "get_attr")
CONSTANTS = ("get_attr", "full", "scalar_tensor")  # what a folded operation becomes

DEAD = "dead code: nothing reads its result"
SAME = "common subexpression: computed once for all its readers"
FOLDED = "constant folding: computed while compiling"
NO_OP = "no-op: its readers read its input instead"
REWRITTEN = "rewritten: {} does its work"
NO_COPY = "no copy: what it would copy is written there at once"
UNKNOWN = "not known"


@dataclass(frozen=True)
class Step:
    """A node of the graph at one stage. `reads`: the others whose results it reads, in order, views left aside."""

    op: str
    at: int  # where it stands in its graph
    reads: tuple[str, ...]
    live: bool  # whether the graph's results depend on it
    work: bool
    exported: str  # the name of the node in the exported graph that it was made of, where known


Stage = dict[str, Step]


def op_name(node: Node) -> str:
    """The kind of an operation, such as "mul"; of what is no operation, placeholder or get_attr."""
    target = getattr(node.target, "_overloadpacket", node.target)
    return getattr(target, "__name__", str(target)) if node.op == "call_function" else node.op


def take_down(graph: Graph) -> Stage:
    live: set[Node] = set()
    todo = [node for node in graph.nodes if _has_effect(node)]
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo += node.all_input_nodes
    return {
        node.name: Step(op_name(node), at, tuple(_reads(node)), node in live, _is_work(node), _exported_name(node))
        for at, node in enumerate(graph.nodes)
    }


def causes(exported: Stage, stages: list[Stage]) -> dict[str, str]:
    """What took out each operation that the last stage has not, or that nothing reads there. Those that only the
    exported graph has are named "exported.NAME"."""
    first = _in_terms_of(exported, stages[0])
    gone = {name: by for name, by in _taken_out([exported, first]).items() if name not in first}
    return {f"exported.{name}": by for name, by in gone.items()} | _taken_out(stages)


def _in_terms_of(exported: Stage, stage: Stage) -> Stage:
    """Each operation of the exported graph with what the stage made of it: of one, several may have become."""
    inputs = ([name for name, step in each.items() if step.op in INPUTS] for each in (stage, exported))
    name_of = dict(zip(*inputs, strict=False))  # they are in the same order
    name_of |= {name: step.exported for name, step in stage.items() if step.exported in exported}
    translated: Stage = {}
    inner: dict[str, list[str]] = {}  # a node of which nothing is known is a part of what reads it: what it reads
    for name, step in stage.items():
        own = name_of.get(name, name)
        reads = [each for other in step.reads for each in inner.get(other, [name_of.get(other, other)]) if each != own]
        if own not in exported:
            inner[name] = reads
        else:
            before = translated.get(own, replace(step, reads=(), live=False))
            translated[own] = replace(before, at=step.at, reads=(*before.reads, *reads), live=before.live or step.live)
    return translated


def _taken_out(stages: list[Stage]) -> dict[str, str]:
    by: dict[str, str] = {}
    readers = [_readers(stage) for stage in stages]
    for name in dict.fromkeys(name for stage in stages for name, step in stage.items() if step.work):
        alive = [at for at, stage in enumerate(stages) if _live(name, stage)]
        if not alive:
            by[name] = DEAD
        elif alive[-1] < len(stages) - 1:
            by[name] = _cause(name, stages[alive[-1]], stages[alive[-1] + 1], readers[alive[-1]])
    return {name: cause for name, cause in by.items() if cause}


def _readers(stage: Stage) -> dict[str, list[str]]:
    readers = defaultdict(list)
    for name, step in stage.items():
        for read in dict.fromkeys(step.reads if step.live else ()):
            readers[read].append(name)
    return readers


def _cause(name: str, before: Stage, after: Stage, readers: dict[str, list[str]]) -> str:
    """What happened to an operation between two stages. "" where another of its kind took its place."""
    if name in after and after[name].op in INPUTS:  # a value that keeps the operation's name
        return FOLDED
    if before[name].op == "copy_":  # into an input, such as the KV cache
        return NO_COPY
    staying = [reader for reader in readers[name] if _live(reader, after)]
    for reader in staying:
        instead = _instead(name, before[reader], after[reader])
        if _depends(name, set(instead), before):
            return NO_OP
        for other in instead:
            op = after[other].op
            if op == before[name].op:
                return SAME if other in before else ""
            return FOLDED if op in CONSTANTS else REWRITTEN.format(op)
    if staying:
        return DEAD  # they are computed without it
    return next(filter(None, (_cause(reader, before, after, readers) for reader in readers[name])), UNKNOWN)


def _instead(name: str, was: Step, now: Step) -> list[str]:
    """What a reader reads in an operation's place; where it was itself taken apart, all that it did not read before."""
    if was.op == now.op and len(was.reads) == len(now.reads):
        return [after for before, after in zip(was.reads, now.reads, strict=True) if before == name != after]
    return list(Counter(now.reads) - Counter(was.reads))


def _live(name: str, stage: Stage) -> bool:
    return name in stage and stage[name].live and stage[name].op not in INPUTS


def _depends(name: str, others: set[str], stage: Stage) -> bool:
    """Whether a result depends on one of the others. Only what stands behind the first of them can."""
    first = min((stage[other].at for other in others if other in stage), default=len(stage))
    seen, todo = {name}, [name]
    while todo:
        more = {read for read in stage[todo.pop()].reads if read in stage and stage[read].at >= first} - seen
        if more & others:
            return True
        seen |= more
        todo += more
    return False


def _is_work(node: Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and op_name(node) not in FREE and isinstance(value, (Tensor, tuple, list))


def _has_effect(node: Node) -> bool:
    """Checks of types and lengths do not count: a result that only they read is computed for nothing."""
    if node.op != "call_function":
        return node.op == "output"
    check = op_name(node).startswith(("_assert", "sym_constrain"))
    return "kernel_idx" in node.kwargs or (node.is_impure() and not check)


def _reads(node: Node) -> Iterator[str]:
    for leaf in tree_leaves((node.args, node.kwargs)):
        while isinstance(leaf, Node) and op_name(leaf) in FREE and leaf.all_input_nodes:
            leaf = leaf.all_input_nodes[0]
        if isinstance(leaf, Node):
            yield leaf.name


def _exported_name(node: Node) -> str:
    """PyTorch keeps, for each node, of which node of which earlier graph it was made."""
    sources: Any = node.meta.get("from_node")
    name = ""
    while sources:
        name, sources = sources[-1].name, sources[-1].from_node
    return name
