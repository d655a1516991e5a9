"""The laboratory on an NVIDIA GPU: its counts against the profiler's and the tensors' own, its switches against
results, what the binary says against what the driver says."""

import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import pytest
import torch
from conftest import limits
from torch import nn

from helpers import BuildRecipe, inspect, load
from helpers.backends.aot.early_start import PREFIX
from helpers.course.lab import profile as lab
from helpers.course.lab.binary import compiled_for
from helpers.course.lab.code import beside, generated_loops
from helpers.course.lab.compiled import compile_module
from helpers.machine import hardware
from helpers.model.checkpoint import BUNDLED
from helpers.recipe import Fusion

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::FutureWarning")]
ROWS, IN, OUT = 64, 64, 1024
LAYERS = 2
GPU = torch.autograd.DeviceType.CUDA


def ran_on_gpu(step):
    """Names of all kernels that torch.profiler sees run on the GPU, with how often."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return Counter(event.name for event in profiler.events() if event.device_type == GPU)


def written(names):
    """Those that the compiler wrote, or we."""
    return Counter({name: count for name, count in names.items() if lab.WRITTEN.match(name)})


# ---- a module ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Norm, product, activation, each of small operations."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(IN))
        self.linear = nn.Linear(IN, OUT, bias=False)

    def forward(self, x):
        y = self.linear(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.scale)
        return 0.5 * y * (1 + torch.tanh(0.79788456 * (y + 0.044715 * y * y * y)))


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block().eval().cuda(), torch.randn(ROWS, IN, device="cuda")


@pytest.fixture(scope="module", params=["fused", "apart"])
def compiled(request, block):
    return compile_module(block[0], (block[1],), fusion=request.param == "fused")


@pytest.fixture(scope="module")
def timed(compiled, block):
    return lab.with_seconds(compiled.report, lab.launches(lambda: compiled(block[1]), lab.ATEN, rounds=3))


def test_kernels_of_a_module_are_those_that_the_profiler_counts(timed, compiled, block):
    names = ran_on_gpu(lambda: compiled(block[1]))
    generated = [k for k in timed.kernels if k.kind == "generated"]
    assert Counter(k.details["launch"] for k in generated) == written(names)
    (product,) = (k for k in timed.kernels if k.kind == "library")
    assert product.details["launch"] == "aten::mm" and len(names) > len(written(names))
    assert all(took > 0 for k in timed.kernels for took in k.details["seconds"])


def test_fused_lists_are_those_in_the_names_that_inductor_gave(timed):
    kinds = {operation.name: operation.op for operation in timed.operations}
    for kernel in timed.kernels:
        if kernel.kind == "generated":
            named = re.fullmatch(r"triton_[a-z]+_fused_(.*)_\d+", kernel.details["launch"])[1].split("_")
            assert {kinds[name] for name in kernel.fused} <= set(named)
    assert {name for kernel in timed.kernels for name in kernel.fused} == set(kinds)


def test_bytes_are_the_tensors_sizes_and_fusion_saves_the_rest(block):
    module, x = block
    fused, apart = (compile_module(module, (x,), fusion=on) for on in (True, False))
    y = ROWS * OUT * 4
    outside = x.nbytes + sum(p.nbytes for p in module.parameters()) + y
    assert lab.moved(fused.report) == (outside + 2 * x.nbytes + 2 * y, outside)
    reads = {operation.name: len(operation.inputs) for operation in apart.report.operations}
    for kernel in apart.report.kernels[-9:]:
        assert kernel.details["bytes"] == (reads[kernel.fused[0]] + 1) * y


def test_fusion_changes_the_code_of_a_module_and_not_its_result(compiled, block):
    module, x = block
    torch.testing.assert_close(compiled(x), module(x), atol=1e-5, rtol=1e-4)
    assert sum(map(len, (k.fused for k in compiled.report.kernels))) >= len(compiled.report.operations)
    sizes = {len(kernel.fused) for kernel in compiled.report.kernels}
    assert sizes == {1} or len(compiled.report.kernels) == 3


def test_triton_code_stands_beside_the_lines_that_asked_for_it(block):
    report = compile_module(block[0], (block[1],)).report
    table = beside(report.kernels[-1], report)
    assert sorted(op for _, op, _ in table.rows if op) == sorted("mul mul mul mul add mul tanh add mul".split())
    (line,) = {line for _, op, line in table.rows if op}
    assert line.startswith("test_lab_gpu.py:") and "0.044715" in line
    assert "def triton_" in table.rows[0][0] and not any(op for text, op, _ in table.rows if "tl.load" in text)


def test_the_binary_of_a_module_is_for_this_gpu(compiled):
    assert list(compiled.targets) == [capability()] and compiled.targets[capability()] >= 2


def capability():
    return "{}.{}".format(*torch.cuda.get_device_capability())


# ---- engines ----------------------------------------------------------------------------------------------------

SWITCHES = {"all on": Fusion(), **{f"{name} off": Fusion(**{name: False}) for name in ("kernels", "qkv", "gate_up")}}


@pytest.fixture(scope="module")
def folders(built, checkpoint):
    """A model whose weights take longer to read than its kernels take to start, once for each switch of fusion."""
    shape = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": LAYERS, "vocab_size": 2048}
    shape |= {"max_position_embeddings": 256}
    folder = checkpoint("llama", **shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder / name)
    options = limits(max_batch_size=1, device="cuda")
    with ThreadPoolExecutor(max(1, hardware.free_cores() // 4)) as pool:
        building = {
            name: pool.submit(built, BuildRecipe(str(folder), fusion=fusion, **options))
            for name, fusion in SWITCHES.items()
        }
    return {name: future.result() for name, future in building.items()} | {"model": folder}


@pytest.fixture(scope="module")
def engines(folders):
    loaded = {name: load(folders[name]) for name in SWITCHES}
    yield loaded
    for engine in loaded.values():
        engine.close()


@pytest.mark.parametrize("graph", ["decode_b1", "prefill"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_kernels_of_an_engine_are_those_that_the_profiler_counts(engines, folders, switch, graph):
    """Of a decode step, in the run that is recorded: the engine's own, and not the one that was timed."""
    engine = engines[switch]
    report = lab.profile(engine, inspect(folders[switch]).of(graph))
    ids = engine.tokenize("Once upon a time")
    engine.prefill([ids])
    names = ran_on_gpu((lambda: engine.prefill([ids])) if graph == "prefill" else (lambda: engine.decode([14])))
    ours = [k.details["launch"] for k in report.kernels if k.kind == "ours"]
    library = [k.details["launch"] for k in report.kernels if k.kind == "library"]
    generated = [k.details["launch"] for k in report.kernels if k.kind == "generated"]
    assert Counter(ours + generated) == written(names)
    assert all(name.startswith(PREFIX) for name in ours) and all(name.startswith("triton_") for name in generated)
    assert not any(map(lab.WRITTEN.match, library))
    assert bool(library) == (graph == "prefill" or switch == "kernels off")
    assert sum(row[2] for row in lab.costs(report).rows) == len(report.kernels)
    rounds = {len(k.details["seconds"]) for k in report.kernels}  # one that launched something else is left out
    assert len(rounds) == 1 and lab.ROUNDS / 2 < rounds.pop() <= lab.ROUNDS
    assert all(min(k.details["seconds"]) > 0 for k in report.kernels)


def test_kernels_take_about_as_long_as_the_step(engines, folders):
    engine, report = engines["all on"], inspect(folders["all on"]).of("decode_b1")
    shares = []
    for _ in range(5):
        kernels = sum(map(lab.seconds, lab.profile(engine, report).kernels))
        engine.prefill([engine.tokenize("Once upon a time")])
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(100):
            engine.step.run(0)
        end.record()
        end.synchronize()
        shares.append(kernels / (begin.elapsed_time(end) / 100 * 1e-3))
    print("kernels alone, as a share of the recorded step:", *(f"{share:.2f}" for share in shares))
    assert 0.5 < median(shares) < 1.5


def test_bytes_of_a_decode_step_are_the_weights_and_little_more(engines, folders):
    weights = engines["all on"].weights
    read = sum(tensor.nbytes for name, tensor in weights.items() if name.startswith(("layers.", "head.", "norm")))
    total, must = lab.moved(inspect(folders["all on"]).of("decode_b1"))
    assert read < must <= total < 1.1 * read


def test_the_triton_source_of_an_engines_kernel_has_the_models_lines(folders):
    report = inspect(folders["all on"]).of("prefill")
    written = [k for k in report.kernels if k.kind != "library"]
    sources = zip(written, generated_loops(folders["all on"], "prefill"), strict=True)
    kernel, code = max(sources, key=lambda pair: len(pair[0].fused))
    rows = beside(kernel, report, code).rows
    kinds = {operation.name: operation.op for operation in report.operations}
    ops = [op for _, op, _ in rows if op]
    assert rows[0][0].startswith("def triton_") and len(ops) > 2
    assert not Counter(ops) - Counter(kinds[name] for name in kernel.fused)
    assert all(re.match(r"(llama|products)\.py:\d+  \S", line) for _, op, line in rows if op)


@pytest.mark.parametrize("graph", ["decode_b1", "prefill"])
def test_the_binary_of_an_engine_is_for_this_gpu(folders, graph):
    counts = compiled_for(folders["all on"] / f"{graph}.pt2")
    sources = set(generated_loops(folders["all on"], graph))
    assert list(counts) == [capability()] and counts[capability()] >= len(sources) > 1


def test_switches_of_fusion_change_the_code_and_not_the_result(engines, folders):
    code = {name: generated_loops(folders[name], "decode_b1") for name in SWITCHES}
    launches = {name: len(inspect(folders[name]).of("decode_b1").kernels) for name in SWITCHES}
    expected = engines["all on"].logits("Once upon a time")
    for name in list(SWITCHES)[1:]:
        assert code[name] != code["all on"] and launches[name] >= launches["all on"]
        logits = engines[name].logits("Once upon a time")
        assert ((logits - expected).abs().max() / expected.abs().max()).item() < 1e-3
        ids = engines[name].tokenize("Once upon a time")
        engines[name].prefill([ids[:-1]])
        step = engines[name].decode(ids[-1:])[0].cpu()
        assert ((step - expected).abs().max() / expected.abs().max()).item() < 1e-3


def test_eager_pytorch_on_the_gpu_is_told_by_operations(folders):
    with load(BuildRecipe(str(folders["model"]), backend="pytorch", **limits(device="cuda"))) as model:
        report = lab.profile(model)
    print("eager:", *(k.name for k in report.kernels))
    assert sum(k.name == "linear" for k in report.kernels) == 7 * LAYERS + 1  # seven in each layer, and the head
    times = lab.by_work(report)
    assert times["products"] > 0 and times["the rest"] > 0
