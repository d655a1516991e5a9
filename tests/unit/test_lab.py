"""The laboratory's pictures and sentences, on reports that are made by hand."""

import json
import re
import shutil
import textwrap
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import nbformat
import pytest
import torch

from helpers import inspect
from helpers.backends.aot import stages
from helpers.backends.report import EngineReport, Kernel, Operation
from helpers.backends.tensorrt import layers
from helpers.course.lab import pictures, profile
from helpers.course.lab.binary import compiled_for, vector_registers
from helpers.course.lab.code import beside, generated_loops
from helpers.course.lab.compiled import compile_module
from helpers.course.recorded import recorded
from helpers.engine import build_module
from helpers.errors import BackendUnavailable, CourseError, InputError
from helpers.paths import PROJECT

LINES = {"pow": "x.square()", "mean": "x.square().mean()", "mul": "x * root", "mm": "y @ w", "exp": "y.exp()"}


def report() -> EngineReport:
    """Three kernels: two operations of a norm, a product, and one that does the norm's last multiplication again."""
    chain = ["pow", "mean", "mul", "mm", "exp"]
    operations = [
        Operation("g", op, op, "float32", inputs=tuple(chain[at - 1 : at]), source=f"m.py:{at}", line=LINES[op])
        for at, op in enumerate(chain)
    ]
    kernels = [
        Kernel("g", "a", "generated", ("pow", "mean", "mul"), "float32", {"bytes": 100, "outside": {"x": 40}}),
        Kernel("g", "b", "library", ("mm",), "float32", {"bytes": 1000, "outside": {"w": 900}}),
        Kernel("g", "c", "generated", ("mul", "exp"), "float32", {"bytes": 80, "outside": {"x": 40, "y": 20}}),
    ]
    return EngineReport("aot", operations, kernels)


A, B, C = "cpp_fused_a", "aoti_torch_b", "cpp_fused_c"
LAUNCHED = [[(A, 1e-6), (B, 9e-6), (C, 2e-6)], [(A, 3e-6), (B, 9e-6), (C, 2e-6)]]


def timed() -> EngineReport:
    return profile.with_seconds(report(), LAUNCHED)


def test_a_report_keeps_its_edges_when_it_is_written():
    assert EngineReport.from_dict(report().to_dict()) == report()


def test_bytes_from_outside_count_once_for_the_graph_and_in_each_kernel():
    assert [kernel.must for kernel in report().kernels] == [40, 900, 60]
    assert profile.moved(report()) == (1180, 40 + 900 + 20)


def test_kernels_that_do_the_same_share_a_row_and_the_dearest_comes_first():
    twice = timed()
    twice = replace(twice, kernels=[*twice.kernels, *twice.kernels])
    assert profile.costs(twice).rows == [
        ("mm", "library", 2, "69.2%", "2,000", "900"),  # the same weight, read twice
        ("mean mul pow", "generated", 2, "15.4%", "200", "40"),
        ("exp mul", "generated", 2, "15.4%", "160", "60"),
    ]
    assert [row[3] for row in profile.costs(report()).rows] == ["", "", ""]


def test_an_open_length_has_costs_and_no_bytes():
    """The layers of a TensorRT-LLM engine, in the inspector's form: the batch is known only at run time."""
    names = ("layers/0/attention/qkv/PLUGIN_V2_Gemm_0", "layers/0/mlp/ACTIVATION_SIGMOID_0 + layers/0/mlp/PROD_1")
    tensor = {"Name": "out", "Dimensions": [-1, 256], "Format/Datatype": "Row major linear FP16 format"}
    text = json.dumps({"Layers": [{"Name": name, "LayerType": "Myelin", "Outputs": [tensor]} for name in names]})
    open_length = EngineReport("tensorrt_llm", *layers.by_name("engine", layers.parse_inspector(text)))
    assert profile.costs(open_length).rows == [
        ("plugin_v2_gemm", "Myelin", 1, "", "", ""),
        ("activation_sigmoid prod", "Myelin", 1, "", "", ""),
    ]
    assert "3 operations in 2 kernels" in pictures.clusters(open_length).alt
    with pytest.raises(InputError, match="not known"):
        profile.moved(open_length)


def test_seconds_go_to_the_kernels_in_order():
    assert [kernel.details["seconds"] for kernel in timed().kernels] == [[1e-6, 3e-6], [9e-6, 9e-6], [2e-6, 2e-6]]
    assert profile.by_work(timed()) == pytest.approx(
        {"norms": 2e-6, "products": 9e-6, "attention": 2e-6, "the rest": 0}
    )


def test_a_library_call_that_comes_earlier_or_later_than_listed_keeps_its_own_seconds():
    launched = [[(B, 9e-6), (A, 1e-6), (C, 2e-6)]]
    assert [kernel.details["seconds"] for kernel in profile.with_seconds(report(), launched).kernels] == [
        [1e-6],
        [9e-6],
        [2e-6],
    ]


def test_a_round_in_which_eager_pytorch_did_something_else_is_left_out():
    usual, other = [("aten::mm", 1e-6), ("aten::add", 2e-6)], [("aten::mm", 5e-6)]
    timed = profile._eager([usual, other, usual])
    assert [(k.name, k.details["seconds"]) for k in timed.kernels] == [("mm", [1e-6] * 2), ("add", [2e-6] * 2)]
    with pytest.raises(BackendUnavailable, match="same operations"):
        profile._eager([usual, other])


@pytest.mark.parametrize("kernels", [[], report().kernels[:2], [*report().kernels, report().kernels[0]]])
def test_another_number_of_launches_is_refused(kernels):
    with pytest.raises(BackendUnavailable, match=f"lists {len(kernels)} kernels"):
        profile.with_seconds(replace(report(), kernels=kernels), LAUNCHED)


def test_the_embedding_that_torch_looks_up_is_no_launch():
    first = Kernel("g", "embedding", "library", ("embedding",), "float32", {"bytes": 0, "outside": {}})
    assert len(profile.with_seconds(replace(report(), kernels=[first, *report().kernels]), LAUNCHED).kernels) == 3


def event(name, start, *kernels, parent=None, gpu=False, took=1.0):
    """What torch.profiler makes of a call on the host, with the kernels that it launched; or of what ran on a GPU."""
    types = torch.autograd.DeviceType
    return SimpleNamespace(
        name=name,
        kernels=[SimpleNamespace(name=kernel) for kernel in kernels],
        cpu_parent=parent,
        device_type=types.CUDA if gpu else types.CPU,
        is_user_annotation=False,
        time_range=SimpleNamespace(start=start, elapsed_us=lambda: took),
    )


@pytest.mark.parametrize("told", [True, False], ids=["generated launches are told too", "they are not"])
def test_on_a_gpu_a_librarys_kernels_count_for_the_call_that_launched_them(told):
    """A split product is two kernels, and sits in calls of calls; a copy before the graph, and a sum after it, are
    none of the graph's. Some versions of torch record the calls of generated kernels, others do not."""
    product = event("aoti_torch_cuda_mm_out", 3)
    host = [
        event("aten::copy_", 1, "Memcpy HtoD"),
        *([event("triton_norm", 2, "triton_norm")] if told else []),
        *(product, event("aten::mm", 4, "gemm", "splitKreduce", parent=product)),
        *(event("aoti_torch_cuda_mm_out", 5, "gemm"), event("aten::sum", 6, "reduce")),
    ]
    names = ("Memcpy HtoD", "triton_norm", "gemm", "splitKreduce", "gemm", "_early_attend", "reduce")
    gpu = [event(name, 10 + at, gpu=True, took=2.0**at) for at, name in enumerate(names)]
    ran = profile.gpu_launches([*host, *gpu], profile.COMPILED)
    expected = {"triton_norm": 2, "aoti_torch_cuda_mm_out": 4 + 8, "second": 16, "_early_attend": 32}
    assert [name for name, _ in ran] == [name.replace("second", "aoti_torch_cuda_mm_out") for name in expected]
    assert [took for _, took in ran] == pytest.approx([took * 1e-6 for took in expected.values()])
    # Eager PyTorch: each operation that Python calls, but for those that only move.
    host = [event("aten::to", 1), event("aten::linear", 3), event("aten::add", 5, "add")]
    host += [event("aten::copy_", 2, "Memcpy HtoD", parent=host[0]), event("aten::mm", 4, "gemm", parent=host[1])]
    host.append(event(profile.PROFILERS_OWN, 3, "Memcpy HtoD", parent=host[2]))
    gpu = [event(name, 10 + at, gpu=True) for at, name in enumerate(("Memcpy HtoD", "gemm", "add"))]
    events = sorted([*host, *gpu], key=lambda each: each.time_range.start)
    assert [name for name, _ in profile.gpu_launches(events, profile.ATEN)] == ["aten::linear", "aten::add"]
    assert not profile.gpu_launches(host, profile.ATEN)
    # From compiled code: nothing is known of who called.
    names = (
        "triton_norm",
        "gemm",
        "cublasLt::splitKreduce_kernel",
        "Memcpy DtoD (Device -> Device)",
        "gemm",
        "triton_other",
    )
    gpu = [event(name, at, gpu=True, took=2.0**at) for at, name in enumerate(names)]
    ran = profile.gpu_launches(gpu, profile.COMPILED)
    assert [name for name, _ in ran] == ["triton_norm", "gemm", "gemm", "triton_other"]
    assert [took for _, took in ran] == pytest.approx([1e-6, 6e-6, 24e-6, 32e-6])


def test_each_operation_stands_below_what_it_reads_and_in_its_last_kernel():
    picture = pictures.clusters(report())
    texts = [text.get_text() for text in picture.figure.axes[0].texts]
    assert texts == ["1: pow", "1: mean", "3: mul", "2: mm", "3: exp"]
    heights = [text.get_position()[1] for text in picture.figure.axes[0].texts]
    assert heights == sorted(heights) and "5 operations in 3 kernels" in picture.alt
    assert picture.png().startswith(b"\x89PNG")


def test_the_replay_begins_with_operations_and_ends_with_kernels():
    picture = pictures.replay(report())
    titles = [axes.get_title() for axes in picture.figure.axes]
    assert titles[0] == "5 kernels" and titles[-1] == "3 kernels"
    counts = [int(title.split()[0]) for title in titles]
    assert counts == sorted(counts, reverse=True)


def test_the_replay_follows_its_slider():
    from helpers.course.widgets import fusion_replay

    panel = fusion_replay(report())
    seen = []
    for step in range(panel.step.max + 1):
        panel.step.value = step
        seen.append(re.search(r"5 operations in (\d) kernels", panel.output.value)[1])
    assert seen == ["5", "4", "3"]
    assert panel.twin().alt == pictures.replay(report()).alt


def test_pictures_of_times_say_their_numbers():
    roof = pictures.roofline(timed(), 1e9)
    assert "1 GB/s" in roof.alt and "products: 1 kernels, 9 microseconds" in roof.alt
    bars = pictures.time_by_work({"before": timed(), "after": timed()})
    assert "before 0.01 ms in 3 launches" in bars.alt and bars.png().startswith(b"\x89PNG")


CODE = """
    for(int64_t x0=static_cast<int64_t>(0L); x0<static_cast<int64_t>(64L); x0+=static_cast<int64_t>(16L))
    {
        auto tmp0 = at::vec::Vectorized<float>::loadu(in_ptr0 + static_cast<int64_t>(x0), static_cast<int64_t>(16));
        auto tmp1 = tmp0 * tmp0;
        tmp_acc0_vec = tmp_acc0_vec + tmp1;
        auto tmp2 = tmp0 * tmp1;
        tmp2.store(out_ptr0 + static_cast<int64_t>(x0));
    }
"""


def test_a_line_of_code_goes_with_the_next_operation_that_is_written_so():
    table = beside(report().kernels[0], report(), CODE)
    assert [op for _, op, _ in table.rows] == ["", "", "pow", "mean", "mul", ""]
    assert [line for *_, line in table.rows][2:5] == [
        f"m.py:{at}  {LINES[op]}" for at, op in enumerate(("pow", "mean", "mul"))
    ]
    assert "static_cast" not in str(table) and "at::vec" not in str(table)


def test_what_another_kernel_has_computed_is_passed_over():
    """The square of a norm is in the list of the kernel that multiplies by the root: it reads what came of it."""
    kernel = replace(report().kernels[0], fused=("pow", "mean", "mul"))
    code = "for(;;)\n    auto tmp1 = tmp0 / tmp9;\n    auto tmp2 = tmp0 * tmp1;"
    assert [op for _, op, _ in beside(kernel, report(), code).rows] == ["", "mean", "mul"]


# What Inductor of PyTorch 2.13 writes for the norm of a block, in Triton; and for its activation.
TRITON = """
@triton_heuristics.persistent_reduction(size_hints={'x': 64, 'r0_': 64}, filename=__file__)
@triton.jit
def triton_per_fused_add_mean_mul_pow_rsqrt_0(in_ptr0, in_ptr1, out_ptr1, xnumel, r0_numel, XBLOCK : tl.constexpr):
    xindex = xoffset + tl.arange(0, XBLOCK)[:, None]
    tmp0 = tl.load(in_ptr0 + (r0_1 + 64*x0), xmask, eviction_policy='evict_first', other=0.0)
    tmp12 = tl.load(in_ptr1 + (r0_1), None, eviction_policy='evict_last')
    tmp1 = tmp0 * tmp0
    tmp2 = tl.broadcast_to(tmp1, [XBLOCK, R0_BLOCK])
    tmp4 = tl.where(xmask, tmp2, 0)
    tmp5 = tl.sum(tmp4, 1)[:, None].to(tl.float32)
    tmp6 = tl.full([1, 1], 64.0, tl.float32)
    tmp7 = (tmp5 / tmp6)
    tmp8 = tl.full([1, 1], 1e-05, tl.float32)
    tmp9 = tmp7 + tmp8
    tmp10 = libdevice.rsqrt(tmp9)
    tmp11 = tmp0 * tmp10
    tmp13 = tmp11 * tmp12
    tl.store(out_ptr1 + (r0_1 + 64*x0), tmp13, xmask)
"""


def test_triton_code_stands_beside_the_lines_too():
    ops = ("pow", "mean", "add", "rsqrt", "mul", "mul")
    operations = [Operation("g", f"{op}{at}", op, "float32", line=f"line {at}") for at, op in enumerate(ops)]
    kernel = Kernel("g", "norm", "generated", tuple(o.name for o in operations), "float32", {"code": TRITON})
    rows = beside(kernel, EngineReport("aot", operations, [kernel])).rows
    assert [(text.split(" = ")[0].strip(), op) for text, op, _ in rows if op] == [
        *(("tmp1", "pow"), ("tmp5", "mean"), ("tmp9", "add")),
        *(("tmp10", "rsqrt"), ("tmp11", "mul"), ("tmp13", "mul")),
    ]
    assert rows[0][0].startswith("def triton_per_fused")


def test_the_triton_code_of_a_gpus_engine_is_found_in_its_package(tmp_path):
    """The form of PyTorch 2.13's C++ for a GPU: a function for each kernel, which quotes it; then the calls."""
    body = TRITON.replace("\n", "\n    ")
    launch = "static __attribute__((noinline)) void call_{0}(\n    int64_t xnumel,\n    kernels_type_& kernels_\n){{\n"
    quoted = (
        "    /*\n    async_compile.triton('{0}', '''{1}''', device_str='cuda')\n    */\n    uint32_t grid_0 = 1;\n}}\n"
    )
    program = "".join((launch + quoted).format(name, body.replace("per_fused", name)) for name in ("first", "other"))
    program += "".join(
        f"        call_{name}(x, 64L, kernels, this->cubin_dir_);\n" for name in ("other", "first", "other")
    )
    with zipfile.ZipFile(tmp_path / "decode_b1.pt2", "w") as archive:
        archive.writestr("decode_b1/data/aotinductor/model/c1.wrapper.cpp", program)
    loops = generated_loops(tmp_path, "decode_b1")
    assert [re.search(r"def (\w+?)_add", loop)[1] for loop in loops] == ["triton_other", "triton_first", "triton_other"]
    assert loops[1] == TRITON.replace("per_fused", "first")


LOOP = """{
    for(int64_t x0=0; x0<256; x0+=16)
    {
        out_ptr0[x0] = tmp8 * tmp9;
    }
}
"""


def test_a_loop_is_found_whether_one_thread_runs_it_or_several(tmp_path):
    """As Inductor writes them: what several threads share stands one level deeper, several loops in a region."""
    alone = textwrap.indent(LOOP, "    ")
    shared = textwrap.indent("#pragma omp for\n".join(["{\n", *LOOP.splitlines(keepends=True)[1:]]), "        ")
    opened = "    #pragma omp parallel num_threads(2)\n    {\n        int tid = omp_get_thread_num();\n"
    region = f"{opened}{shared * 2}    }}\n"
    with zipfile.ZipFile(tmp_path / "decode_b1.pt2", "w") as archive:
        archive.writestr("x.kernel.cpp", f'extern "C"  void  cpp_fused()\n{{\n{alone}{region}{alone}{region}}}\n')
    loops = generated_loops(tmp_path, "decode_b1")
    assert len(loops) == 6
    assert all(loop.count("for(int64_t") == 1 and loop.count("tmp8") == 1 for loop in loops)


def stage(**steps: tuple[str, str]) -> stages.Stage:
    """A graph, given as name: (kind, what it reads). All but the sum reach the output."""
    return {
        name: stages.Step(op, at, tuple(reads.split()), op != "sum", op not in (*stages.INPUTS, "output"), name)
        for at, (name, (op, reads)) in enumerate(steps.items())
    }


@pytest.mark.parametrize(
    ("op", "after", "cause"),
    [
        ("clone", {"y": ("sin", "x"), "end": ("output", "y y")}, stages.NO_OP),
        ("sin", {"y": ("sin", "x"), "end": ("output", "y y")}, stages.NO_OP),  # of y; a twin of y would read x
        ("exp", {"y": ("sin", "x"), "value": ("get_attr", ""), "end": ("output", "y value")}, stages.FOLDED),
        ("exp", {"y": ("sin", "x"), "gone": ("get_attr", ""), "end": ("output", "y gone")}, stages.FOLDED),
        (
            "exp",
            {"y": ("sin", "x"), "pow_1": ("pow", "y"), "end": ("output", "y pow_1")},
            stages.REWRITTEN.format("pow"),
        ),
        ("exp", {"y": ("sin", "x"), "exp_1": ("exp", "y"), "end": ("output", "y exp_1")}, None),
        ("exp", {"y": ("sin", "x"), "end": ("output", "y")}, stages.DEAD),
    ],
)
def test_what_its_readers_read_instead_tells_what_took_an_operation_out(op, after, cause):
    x, unread = {"x": ("placeholder", "")}, {"unread": ("sum", "x")}
    before = stage(**x, **unread, y=("sin", "x"), gone=(op, "y"), end=("output", "y gone"))
    expected = {"unread": stages.DEAD, **({"gone": cause} if cause else {})}
    assert stages.causes(before, [before, stage(**x, **after)]) == expected
    only_exported = {f"exported.{name}": by for name, by in expected.items()}
    if not {"value", "pow_1", "exp_1", "gone"} & after.keys():  # what export knows nothing of is a part of its reader
        assert stages.causes(before, [stage(**x, **after)]) == only_exported


def test_of_twins_one_is_a_common_subexpression_and_so_is_what_only_it_reads():
    x, end = {"x": ("placeholder", "")}, ("output", "once again")
    once, again = {"a": ("mm", "x"), "once": ("sin", "a")}, {"b": ("mm", "x"), "again": ("sin", "b")}
    before, after = stage(**x, **once, **again, end=end), stage(**x, **once, end=("output", "once once"))
    assert stages.causes(before, [before, after]) == {"b": stages.SAME, "again": stages.SAME}


def test_two_operations_that_one_reader_loses_at_once_have_each_its_own_cause():
    x, y = {"x": ("placeholder", "")}, {"y": ("sin", "x")}
    before = stage(
        **x, **y, fixed=("exp", "x"), copied=("clone", "y"), end=("mul", "fixed copied"), out=("output", "end")
    )
    after = stage(**x, **y, full=("full", ""), end=("mul", "full y"), out=("output", "end"))
    assert stages.causes(before, [before, after]) == {"fixed": stages.FOLDED, "copied": stages.NO_OP}


def test_of_what_tensorrt_names_no_layer_for_the_report_says_no_more_than_follows():
    ops = {"c": "constant", "e": "unary", "s": "shuffle", "u": "unary", "m": "cast"}
    inputs = {"c": "", "e": "c", "s": "x", "u": "x", "m": "e u"}
    network = [
        {"name": n, "op": op, "node": n, "dtype": "float32", "shape": (1,), "inputs": inputs[n].split(), "outputs": [n]}
        for n, op in ops.items()
    ]
    removed = layers.account("g", network, [], {"c": "", "never": ""})[2]
    known = {"g/c": layers.FOLDED, "g/e": layers.FOLDED, "g/s": layers.MOVED, "g/never": layers.NOT_PARSED}
    assert removed == known | {"g/u": layers.UNKNOWN, "g/m": layers.UNKNOWN}


def test_a_report_written_before_causes_were_known_is_read():
    fields = {**report().to_dict(), "removed": ["g/pow", "g/mul"]}
    old = EngineReport.from_dict(fields)
    assert list(old.of("g").removed) == ["g/pow", "g/mul"] and "not recorded" in str(old)


# The first bytes of GPU code that Triton 3.6 compiled with NVIDIA's assembler, up to the flags.
CUBINS = {
    "8.0": "7f454c460201013307000000000000000200be008000000000000000000000004010000000000000000c00000000000050055000",
    "9.0": "7f454c460201013307000000000000000200be00800000000000000000000000f011000000000000b00d0000000000005a0d5a00",
    "12.0": "7f454c460201014108000000000000000200be00010000000000000000000000881d00000000000088150000000000000a780009",
}


def test_the_compute_capability_is_read_from_the_header_of_each_kernel(tmp_path):
    package = tmp_path / "decode_b1.pt2"
    kernels = {"8.0": 1, "9.0": 2, "12.0": 1}
    with zipfile.ZipFile(package, "w") as archive:
        for capability, count in kernels.items():
            for number in range(count):
                archive.writestr(f"{capability}-{number}.cubin", bytes.fromhex(CUBINS[capability]) + bytes(99))
    assert compiled_for(package) == kernels
    package.write_bytes(package.read_bytes().replace(b"\xbe\x00", b"\x3e\x00"))  # the same files, of another machine
    assert not compiled_for(package)
    plan = tmp_path / "module.plan"
    plan.write_bytes(b"  version_compatible=0\n  accelerators={sm86 sm120 }\n}")
    assert compiled_for(plan) == {"8.6": 1, "12.0": 1}
    plan.write_bytes(b"")
    with pytest.raises(CourseError, match="empty"):
        compiled_for(plan)


@pytest.mark.parametrize("seed", range(3))
def test_calibration_pays_and_wrong_examples_cost(seed):
    """The cells of notebook 07, with other numbers: rounded weights alone err least, wrong examples most."""
    cells = {cell.id: cell.source for cell in nbformat.read(PROJECT / "notebooks" / "07_laboratory.ipynb", 4).cells}
    generator = torch.Generator().manual_seed(seed)
    names = {"torch": torch, "size": 256, "matrix": torch.randn(256, 256, generator=generator)}
    exec(cells["lab-calibration-code"].replace("manual_seed(1)", f"manual_seed({seed})"), names)
    exec(cells["lab-calibration-see"], names)
    assert names["only"] < names["good"] < names["bad"] / 3


def test_machine_code_needs_a_disassembler(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BackendUnavailable, match="objdump"):
        vector_registers(tmp_path)


def test_a_disassembly_that_is_too_long_is_told_as_that(monkeypatch, tmp_path):
    (tmp_path / "objdump").write_text("#!/bin/sh\nexec yes\n")
    (tmp_path / "objdump").chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(tmp_path / name))
    monkeypatch.setattr("helpers.machine.commands.LONGEST", 1 << 16)
    with pytest.raises(InputError, match="too much machine code") as told:
        vector_registers(tmp_path / "x.so")
    assert "does not stop writing" in told.value.cause


@pytest.mark.parametrize("kind", ["fp32", "fp16", "fp16-all-marked", "int8"])
def test_recorded_engines_have_what_the_laboratory_asks_for(kind):
    """Where TensorRT cannot build, notebook 07 reads the bytes of recorded ones."""
    recording = inspect(recorded("block", kind, quiet=True))
    total, must = profile.moved(recording)
    weights = 2 * 256 + 256 * 1024 + 1024
    assert total > must > weights * {"fp32": 4, "int8": 1}.get(kind, 2)


def test_modules_are_exported_one_after_the_other(monkeypatch):
    """Side by side, torch's exports fail."""
    from helpers.backends.tensorrt import builder, onnx_export

    now, most = [], []

    def export(*_, **__):
        now.append(0)
        most.append(len(now))
        time.sleep(0.1)  # for the other to come
        now.pop()
        raise InputError("exported")

    class Own(torch.nn.Linear):
        """Only its export tells what it computes."""

    monkeypatch.setattr(torch.export, "export", export)
    monkeypatch.setattr(onnx_export, "export", export)
    monkeypatch.setattr(builder, "provider_version", lambda _: "1")
    module, inputs = Own(2, 2), (torch.ones(1, 2),)
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(call, module, inputs) for call in (compile_module, build_module) * 2]
    assert all("exported" in str(call.exception()) for call in calls)
    assert most == [1] * 4
