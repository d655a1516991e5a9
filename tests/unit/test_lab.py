"""The laboratory's pictures and sentences, on reports that are made by hand."""

import re
import shutil
from dataclasses import replace

import pytest

from helpers import inspect
from helpers.backends.report import EngineReport, Kernel, Operation
from helpers.course.lab import pictures, profile
from helpers.course.lab.binary import vector_registers
from helpers.course.lab.code import beside
from helpers.course.recorded import recorded
from helpers.errors import BackendUnavailable

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


LAUNCHED = [[("a", 1e-6), ("b", 9e-6), ("c", 2e-6)], [("a", 3e-6), ("b", 9e-6), ("c", 2e-6)]]


def timed() -> EngineReport:
    return profile.with_seconds(report(), LAUNCHED)


def test_a_report_keeps_its_edges_when_it_is_written():
    assert EngineReport.from_dict(report().to_dict()) == report()


def test_bytes_from_outside_count_once_for_the_graph_and_in_each_kernel():
    assert [kernel.must for kernel in report().kernels] == [40, 900, 60]
    assert profile.moved(report()) == (1180, 40 + 900 + 20)


def test_seconds_go_to_the_kernels_in_order():
    assert [kernel.details["seconds"] for kernel in timed().kernels] == [[1e-6, 3e-6], [9e-6, 9e-6], [2e-6, 2e-6]]
    assert profile.by_work(timed()) == pytest.approx(
        {"norms": 2e-6, "products": 9e-6, "attention": 2e-6, "the rest": 0}
    )


@pytest.mark.parametrize("kernels", [[], report().kernels[:2], [*report().kernels, report().kernels[0]]])
def test_another_number_of_launches_is_refused(kernels):
    with pytest.raises(BackendUnavailable, match=f"lists {len(kernels)} kernels"):
        profile.with_seconds(replace(report(), kernels=kernels), LAUNCHED)


def test_the_embedding_that_torch_looks_up_is_no_launch():
    first = Kernel("g", "embedding", "library", ("embedding",), "float32", {"bytes": 0, "outside": {}})
    assert len(profile.with_seconds(replace(report(), kernels=[first, *report().kernels]), LAUNCHED).kernels) == 3


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
        seen.append(re.search(r"5 operations in (\d) kernels", panel.picture.value)[1])
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


def test_stages_say_what_came_and_went():
    lines = pictures.operations_by_stage({"first": ["mul", "mul", "sum"], "then": ["mul", "fma"]}).splitlines()
    assert lines[0].endswith("3 operations") and lines[1].endswith("2 operations  -1 mul, -1 sum, +1 fma")


def test_machine_code_needs_a_disassembler(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BackendUnavailable, match="objdump"):
        vector_registers(tmp_path)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "fp16-all-marked", "int8"])
def test_recorded_engines_have_what_the_laboratory_asks_for(kind):
    """Where TensorRT cannot build, notebook 07 reads the bytes of recorded ones."""
    recording = inspect(recorded("block", kind, quiet=True))
    total, must = profile.moved(recording)
    weights = 2 * 256 + 256 * 1024 + 1024
    assert total > must > weights * {"fp32": 4, "int8": 1}.get(kind, 2)
