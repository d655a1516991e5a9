"""The laboratory (helpers/course/lab): its counts against the profiler's and the tensors' own, its switches against
results, and the sign of each effect that notebook 07 explains."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from conftest import GREEDY, limits
from promises import NIGHTLY
from torch import nn

from helpers import BuildRecipe, inspect, load
from helpers.backends.aot import stages
from helpers.backends.aot.products import matmul, pack
from helpers.course.lab import profile as lab
from helpers.course.lab.binary import compiled_for, vector_registers
from helpers.course.lab.code import beside
from helpers.course.lab.compiled import compile_module
from helpers.course.timing import seconds, take_turns
from helpers.engine import build_module
from helpers.errors import BackendUnavailable, InputError
from helpers.machine import hardware
from helpers.model.checkpoint import BUNDLED

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
AVX = [w for flag, w in {"avx2": 256, "avx512f": 512}.items() if flag in hardware.describe("cpu").instructions]


class Block(nn.Module):
    """Norm, product, activation, each of small operations."""

    def __init__(self, inner=64, outer=1024):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(inner))
        self.linear = nn.Linear(inner, outer)

    def forward(self, x):
        y = self.linear(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.scale)
        return 0.5 * y * (1 + torch.tanh(0.79788456 * (y + 0.044715 * y * y * y)))


ROWS, IN, OUT = 64, 64, 1024


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block(IN, OUT).eval(), torch.randn(ROWS, IN)


@pytest.fixture(scope="module")
def fused(block):
    return compile_module(block[0], (block[1],))


@pytest.fixture(scope="module")
def apart(block):
    return compile_module(block[0], (block[1],), fusion=False)


@pytest.fixture(params=["fused", "apart"])
def compiled(request):
    return request.getfixturevalue(request.param)


def test_kernels_are_those_that_the_profiler_counts(compiled, block):
    launched = lab.launches(lambda: compiled(block[1]), lab.ATEN, rounds=3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        compiled(block[1])
    own = [e for e in profiler.key_averages() if "cpp_fused" in e.key or e.key == "aten::addmm"]
    assert sum(e.count for e in own) == len(compiled.report.kernels) == len(launched[0])


def test_fused_lists_are_those_in_the_names_that_inductor_gave(compiled, block):
    report = lab.with_seconds(compiled.report, lab.launches(lambda: compiled(block[1]), lab.ATEN, rounds=1))
    kinds = {operation.name: operation.op for operation in report.operations}
    for kernel in report.kernels:
        if kernel.kind == "generated":
            named = re.fullmatch(r"(?:graph_\d+_)?cpp_fused_(.*)_\d+", kernel.details["launch"])[1]
            assert named == "_".join(sorted({kinds[name] for name in kernel.fused}))
    assert {name for kernel in report.kernels for name in kernel.fused} == set(kinds)


def test_a_report_that_lists_another_number_of_kernels_is_refused(fused, block):
    damaged = replace(fused.report, kernels=fused.report.kernels[1:])
    with pytest.raises(BackendUnavailable, match="3 launches in a step, and the report lists 2"):
        lab.with_seconds(damaged, lab.launches(lambda: fused(block[1]), lab.ATEN, rounds=1))


def test_bytes_are_the_tensors_sizes(fused, apart, block):
    module, x = block
    y = ROWS * OUT * 4
    outside = x.nbytes + sum(p.nbytes for p in module.parameters()) + y
    assert lab.moved(fused.report)[1] == outside
    normed = x.nbytes  # written by the norm, read by the product; it also keeps one number for each row
    assert lab.moved(fused.report)[0] == outside + 2 * normed + 2 * y
    inputs = [2 if op in ("mul_4", "mul_5", "add_1", "mul_7") else 1 for op in apart_names(apart)]
    assert [k.details["bytes"] for k in apart.report.kernels[-9:]] == [(n + 1) * y for n in inputs]


def apart_names(apart):
    """The operation of each of the nine kernels behind the product."""
    names = [kernel.fused for kernel in apart.report.kernels[-9:]]
    assert all(len(name) == 1 for name in names)
    return [name for (name,) in names]


SWITCHES = {
    "fusion": {"fusion": False},
    "freezing": {"options": {"freezing": True}},
    "portable": {"options": {"cpp.simdlen": 1}},
    **{f"simdlen {width}": {"options": {"cpp.simdlen": width}} for width in AVX[:-1]},
}


@pytest.mark.parametrize("switch", ["fusion", "freezing", "portable", "simdlen 256"])
def test_a_switch_changes_the_code_and_not_the_result(switch, fused, apart, block):
    if switch not in SWITCHES:
        pytest.skip("this processor has no second vector width")
    module, x = block
    other = apart if switch == "fusion" else compile_module(module, (x,), **SWITCHES[switch])
    code = [[k.details.get("code", k.name) for k in c.report.kernels] for c in (fused, other)]
    assert code[0] != code[1]
    torch.testing.assert_close(other(x), module(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.double(), lambda x: x.to(torch.bfloat16), lambda x: x[:-1], lambda x: x.T.contiguous().T, lambda x: [x]],
    ids=["double", "bfloat16", "a row less", "strides", "in a list"],
)
def test_other_inputs_than_those_compiled_for_are_refused(change, fused, block):
    """The machine code would read their memory as if they were those."""
    module, x = block
    torch.testing.assert_close(fused(x.clone()), module(x), atol=1e-5, rtol=1e-4)
    for given in ((change(x),), (), (x, x)):
        with pytest.raises(InputError, match="compiled for") as refused:
            fused(*given)
        assert "compile_module" in refused.value.fix


def test_inputs_in_lists_and_dictionaries_and_numbers_are_compared_too():
    class Parts(nn.Module):
        def forward(self, parts, number):
            return parts["both"][0] - parts["both"][1] * number

    x, y = torch.randn(8), torch.randn(8)
    compiled = compile_module(Parts(), ({"both": [x, y]}, 3))
    torch.testing.assert_close(compiled({"both": [y, x]}, 3), y - 3 * x)
    for given in (({"both": [x, y]}, 4), ({"both": [x, y.half()]}, 3)):
        with pytest.raises(InputError, match="compiled for"):
            compiled(*given)


@pytest.mark.skipif(len(AVX) < 2, reason="needs a processor with AVX2 and AVX-512")
def test_each_width_has_its_registers():
    seen = {w: compile_module(nn.GELU(), (torch.randn(64),), options={"cpp.simdlen": w}).targets for w in (512, 256)}
    zmm, ymm = "zmm (512 bits, AVX-512)", "ymm (256 bits, AVX2)"
    assert seen[512][zmm] > 5 and seen[256][zmm] == 0 and seen[256][ymm] > 5


@pytest.mark.skipif(not AVX, reason="x86 only")
def test_the_registers_of_a_known_library(tmp_path):
    """numpy compiles its sorting for several processors, and chooses when it runs: so all are in one library."""
    libraries = list(Path(numpy.__file__).parent.glob("*core/_simd.*.so"))  # numpy 1 calls the folder core
    if not libraries:
        pytest.skip("this numpy has its library elsewhere")
    counts = vector_registers(libraries[0])
    assert all(
        counts[name] > 100 for name in ("zmm (512 bits, AVX-512)", "ymm (256 bits, AVX2)", "xmm (128 bits, SSE)")
    )
    (tmp_path / "text.so").write_text("no machine code")
    with pytest.raises(InputError, match="no machine code"):
        vector_registers(tmp_path / "text.so")


class Nested(nn.Module):
    def forward(self, x):
        return self.curve(x) + 1

    def curve(self, x):
        return torch.exp(x)


def test_an_operation_names_the_line_of_the_function_that_asked_for_it():
    report = compile_module(Nested(), (torch.randn(64),)).report
    assert {o.op: o.line for o in report.operations} == {
        "exp": "return torch.exp(x)",
        "add": "return self.curve(x) + 1",
    }


def test_code_stands_beside_the_lines_that_asked_for_it(fused):
    table = beside(fused.report.kernels[-1], fused.report)
    kinds = [op for _, op, _ in table.rows if op]
    assert sorted(kinds) == sorted("mul mul mul mul add mul tanh add mul".split())
    (line,) = {line for _, op, line in table.rows if op}
    assert line.startswith("test_laboratory.py:") and "0.044715" in line
    assert not any(op for text, op, _ in table.rows if "loadu" in text or ".store(" in text)


# ---- an engine ------------------------------------------------------------------------------------------------


def test_a_module_that_was_given_one_tensor_twice_reads_both_inputs():
    class Difference(nn.Module):
        def forward(self, left, right):
            return left - 2 * right

    x, y = torch.randn(8), torch.randn(8)
    torch.testing.assert_close(compile_module(Difference(), (x, x))(x, y), x - 2 * y)


def test_a_deep_engine_that_times_its_kernels(built, checkpoint):
    """Thirty layers, of which five are compiled and called six times: each call's launches go to kernels of its own."""
    layers = 30
    folder = checkpoint("llama", num_hidden_layers=layers, vocab_size=2048, tie_word_embeddings=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder / name)
    small = {"model": str(folder), **limits(max_batch_size=1, max_input_len=16, max_seq_len=48)}
    timed = {"num_threads": 1, "optimization_level": 0, "options": {"time_kernels": True}}
    engine_folder = built(BuildRecipe(**small, **timed))
    with load(engine_folder) as engine, load(BuildRecipe(backend="pytorch", **small)) as model:
        for graph in ("decode_b1", "prefill"):
            report = lab.profile(engine, inspect(engine_folder).of(graph))
            assert all(len(k.details["seconds"]) == lab.ROUNDS for k in report.kernels)
            total, must = lab.moved(report)
            assert 0 < must <= total
            launches = [count for _, _, count, *_ in lab.costs(report).rows]
            assert sum(launches) == len(report.kernels) and launches.count(1) < len(launches) / 2
        eager = lab.profile(model)
        torch.testing.assert_close(engine.logits("Once"), model.logits("Once"), atol=1e-4, rtol=1e-4)
    assert sum(k.name == "linear" for k in eager.kernels) == 7 * layers + 1  # seven in each layer, and the head
    assert 0 < sum(lab.by_work(eager).values()) < 1


def test_an_engine_says_which_registers_its_code_names(tiny_engine):
    names = compiled_for(tiny_engine / "decode_b1.pt2")
    assert max(names.values()) > 50
    if AVX:
        assert names[{256: "ymm (256 bits, AVX2)", 512: "zmm (512 bits, AVX-512)"}[AVX[-1]]] > 50


def test_an_engine_that_was_not_built_for_it_says_so(tiny_engine):
    with load(tiny_engine) as engine:
        engine.prefill([[3]])
        with pytest.raises(BackendUnavailable, match="time_kernels"):
            lab.profile(engine, inspect(tiny_engine).of("decode_b1"))
        with pytest.raises(InputError, match="nothing to append"):  # the cache holds what was profiled
            engine.decode([7])


def test_bytes_of_a_tensorrt_layer():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not here")
    block = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU())
    norm, product = inspect(build_module(block, (torch.randn(8, 256),), "fp16", quiet=True)).kernels
    x, y = 8 * 256 * 2, 8 * 1024 * 2
    weights = 2 * (256 * 1024 + 1024)
    assert (norm.details["bytes"], norm.must) == (2 * x + 2 * 2 * 256, x + 2 * 2 * 256)
    assert (product.details["bytes"], product.must) == (x + weights + y, weights + y)


@pytest.mark.parametrize("targets", [["8.6"], ["12.0"], ["8.6", "12.0"]], ids=" ".join)
def test_a_plan_says_which_gpus_it_is_for(targets):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not here")
    module, x = nn.Sequential(nn.Linear(64, 64), nn.GELU()), (torch.randn(8, 64),)
    assert (
        list(compiled_for(build_module(module, x, quiet=True, compute_capabilities=targets) / "module.plan")) == targets
    )


# ---- effects: their sign, by interval, tried again on a busy machine ---------------------------------------------


# Close, or long: beside other tests their rounds are disturbed, and tried again for minutes.
at_night = pytest.mark.skipif(not NIGHTLY, reason="compares times on an idle machine: make nightly")


def is_faster(one, other, repeats=1):
    """Whether one is faster than the other in 12 of 15 rounds, which two alike would be in 2 % of all tries; in some of
    five tries, for other work on the machine disturbs rounds."""
    calls = {name: partial(seconds, *call, repeats=repeats) for name, call in (("one", one), ("other", other))}
    for _ in range(5):
        samples = take_turns(calls, rounds=15)
        if sum(a < b for a, b in zip(samples["one"], samples["other"], strict=True)) >= 12:
            return True
    return False


@at_night
@pytest.mark.promise("Fused kernels are faster", 1, 1)
def test_fusion_pays_where_results_do_not_fit_the_cache(block):
    rows = min(2**28, max(2**26, 2 * hardware.cache_bytes())) // (4 * OUT)
    data = torch.randn(rows, IN)
    both = [(compile_module(block[0], (data,), fusion=on), data) for on in (True, False)]
    assert is_faster(*both)


class Product(nn.Module):
    def __init__(self, form, *names):
        super().__init__()
        self.form, self.names = form, names

    def forward(self, x, *tensors):
        return matmul(dict(zip(self.names, tensors, strict=True)), "m", x, self.form)


def test_packed_weights_are_read_faster_than_strided_ones():
    matrix, x = torch.randn(2048, 2048), torch.randn(1, 2048)
    calls = []
    for form, (name, weight) in (
        ("packed", *pack({"m.weight": matrix}, "m").items()),
        ("rows", ("m.weight", matrix.T.contiguous().T)),
    ):
        call = compile_module(Product(form, name), (x, weight))
        torch.testing.assert_close(call(x, weight), x @ matrix.T, atol=1e-2, rtol=1e-3)
        calls.append((call, x, weight))
    assert is_faster(*calls, repeats=4)


def test_int8_weights_are_read_faster():
    matrix, x = torch.randn(2048, 2048), torch.randn(1, 2048)
    scale = matrix.abs().amax(1) / 127
    calls = []
    for tensors in ({"m.weight": (matrix / scale[:, None]).round().to(torch.int8)}, {"m.weight": matrix}):
        packed = pack(tensors, "m") | ({"m.scale": scale} if calls == [] else {})
        call = compile_module(Product("packed", *packed), (x, *packed.values()))
        error = (call(x, *packed.values()) - x @ matrix.T).norm() / (x @ matrix.T).norm()
        assert error < 0.02
        calls.append((call, x, *packed.values()))
    (small, _), (large, _) = (lab.moved(call.report) for call, *_ in calls)
    assert small < 0.3 * large
    assert is_faster(*calls, repeats=4)


class Joined(nn.Module):
    """Products of one input, and what the model does with them: query, key and value, or the MLP's gate and up. Several
    layers of it, so that the time of one call is small beside theirs."""

    def __init__(self, names, rows):
        super().__init__()
        self.names, self.rows = names, rows

    def forward(self, x, *tensors):
        weights = dict(zip(self.names, tensors, strict=True))
        for _ in range(8):
            y = [matmul(weights, name.removesuffix(".weight.packed"), x, "packed") for name in self.names]
            first, second, *third = y if len(y) > 1 else y[0].split(self.rows, -1)
            x = first.tanh() + second.tanh() + third[0].tanh() if third else first * nn.functional.silu(second)
        return x


@pytest.mark.promise("Fused kernels are faster", 2, 2)
@pytest.mark.parametrize("rows", [(64, 64, 64), (64, 64)], ids=["qkv", "gate_up"])
def test_one_product_pays_where_several_read_the_same_input(rows):
    """What the switches qkv and gate_up join, of so few weights that reading them does not hide it."""
    weights, x = [torch.randn(count, 64) / 8 for count in rows], torch.randn(1, 64)
    calls = []
    for group in ([torch.cat(weights)], weights):
        packed = {}
        for at, weight in enumerate(group):
            packed |= pack({f"{at}.weight": weight}, str(at))
        calls.append((compile_module(Joined(list(packed), rows), (x, *packed.values())), x, *packed.values()))
    joined, apart = (call(*arguments) for call, *arguments in calls)
    torch.testing.assert_close(joined, apart)
    code = [[k.details["code"] for k in call.report.kernels] for call, *_ in calls]
    assert code[0] != code[1] and lab.moved(calls[0][0].report)[1] <= lab.moved(calls[1][0].report)[1]
    assert not NIGHTLY or is_faster(*calls, repeats=100)  # close: see at_night


@at_night
@pytest.mark.promise("Fused kernels are faster", 1, 1)
def test_fused_kernels_pay_in_a_whole_model(built, tiny_engine, tiny_llama):
    """The engine of one layer, and the same without fusion (tests/build/test_aot.py builds it too)."""
    switched_off = {"kernels": False, "qkv": False, "gate_up": False}
    small = limits(max_batch_size=1, max_input_len=16, max_seq_len=48)
    plain = built(BuildRecipe(model=str(tiny_llama), fusion=switched_off, **small))
    with load(tiny_engine) as fused, load(plain) as apart:
        assert is_faster((fused.generate, [5, 6, 7], GREEDY), (apart.generate, [5, 6, 7], GREEDY))


@pytest.mark.skipif(not AVX, reason="needs a processor with AVX2")
def test_vectors_pay():
    x = torch.randn(2**15)
    wide, one = (compile_module(nn.GELU(), (x,), options={"cpp.simdlen": w}) for w in (AVX[-1], 1))
    assert is_faster((wide, x), (one, x), repeats=50)


class Planted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("table", torch.randn(64))

    def forward(self, x):
        unused = (x * 3).sum()  # noqa: F841
        once, again = torch.sin(self.linear(x)), torch.sin(self.linear(x))
        return (once - 2 * again).clone() * (torch.exp(self.table) + 1)


def check_removed(report, frozen):
    """What was planted is gone, by what it must be; or in a kernel, where the compiler does not know enough."""
    planted = {"sum": stages.DEAD, "clone": stages.NO_OP}
    known = {"exp": stages.FOLDED, "sin": stages.SAME, "addmm": stages.SAME}  # only where the weights are
    removed = {name.partition("/")[2].removeprefix("exported."): by for name, by in report.removed.items()}
    done = {name for kernel in report.kernels for name in kernel.fused}
    assert not done & removed.keys()
    for op, cause in (planted | known).items():
        by = {cause for name, cause in removed.items() if name.rstrip("_0123456789") == op}
        assert (cause in by) == (frozen or op in planted), op
    assert frozen or not {stages.FOLDED, stages.SAME} & set(removed.values())
    kinds = [o.op for o in report.operations if o.name in done]
    assert kinds.count("sin") == (1 if frozen else 2) and ("exp" in kinds) != frozen
    assert not {"sum", "clone"} & set(kinds)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_planted_is_taken_out_by_what_must_take_it_out(frozen):
    x, module = torch.randn(8, 64), Planted()
    compiled = compile_module(module, (x,), options={"freezing": frozen})
    torch.testing.assert_close(compiled(x), module(x), atol=1e-5, rtol=1e-4)
    check_removed(compiled.report, frozen)
    causes = list(compiled.report.removed.values())
    for damaged in ({}, dict(zip(compiled.report.removed, causes[1:] + causes[:1], strict=True))):
        with pytest.raises(AssertionError):
            check_removed(replace(compiled.report, removed=damaged), frozen)


def test_what_the_first_module_of_a_process_is_compiled_for_is_its_own():
    """torch tries the processor's instructions once in a process, by libraries that are not the module's."""
    code = "import torch; from helpers.course.lab.compiled import compile_module\n"
    code += "print(*(compile_module(torch.nn.GELU(), (torch.ones(64),)).targets for _ in range(2)), sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = run.stdout.splitlines()[-2:]
    assert first == second


class Chooses(nn.Module):
    def forward(self, x):
        return x[x > 0]


class Scales(nn.Module):
    def forward(self, x):
        return x / x.abs().max().item()


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (Chooses(), {}, "depends on the inputs' values"),
        (Scales(), {}, "depends on the inputs' values"),
        (nn.Identity(), {}, "0 Python programs"),
        (nn.GELU(), {"trace.enabled": True}, "Python programs"),
    ],
    ids=str,
)
def test_a_module_or_an_option_that_leaves_no_one_program_is_told_in_words(module, options, words, tmp_path):
    traces = torch._dynamo.config.patch(debug_dir_root=str(tmp_path))
    with traces, pytest.raises(InputError, match=words) as refused:
        compile_module(module, (torch.randn(4, 8),), options=options)
    assert refused.value.fix
