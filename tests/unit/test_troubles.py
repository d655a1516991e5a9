"""helpers explain: the card for a message, from a whole log too, and none where the course does not know."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from helpers import BuildRecipe, SamplingParams, cli, errors, load
from helpers.backends.tensorrt.builder import missing
from helpers.course import cards, troubles
from helpers.course.cards import CARDS, explain
from helpers.engine import build_onnx
from helpers.errors import BackendUnavailable, BuildError, CourseError, InputError, ModelError, RecipeError, WorkerError
from helpers.machine.worker import Worker
from helpers.messages import Card, matches
from helpers.model.checkpoint import find_checkpoint
from helpers.paths import PROJECT, temporary_folder

# What users of TensorRT-LLM report most, in the words of the public threads that each card names, and a word of the
# way out.
REPORTED = [
    ("Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.", "Build"),
    ("is not compatible with this version of TensorRT, expecting library version 9.2.0.5 got 9.3.0.1", "Build"),
    ("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "smaller limits"),
    ("Executor creation failed due to insufficient GPU memory.", "free_gpu_memory_fraction"),
    ("trtllm-build: error: unrecognized arguments: --max_output_len 1024", "max_seq_len"),
    ("trtllm-build: error: unrecognized arguments: --max_multimodal_len", "tag of the installed version"),
    ("[TRT] [E] 3: getPluginCreator could not find plugin: Gemmtensorrt_llm version: 1", "Import tensorrt_llm"),
    ("Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[a...b]}.)", "TensorRT"),
    ("Killed", "more memory"),
    ("./convert.sh: line 12:  4711 Killed                  python3 convert_checkpoint.py --tp_size 4", "more memory"),
    ("zsh: killed     python build.py", "more memory"),
    ("make: *** [Makefile:7: convert] Killed", "more memory"),
    ("  0%|          | 0/1 [00:00<?, ?it/s]\r\u5df2\u6740\u6b7b", "more memory"),
    ("Out of memory: Killed process 4711 (python3) total-vm:70000000kB", "more memory"),
    ("ModuleNotFoundError: No module named 'tensorrt_llm.bindings'", "another folder"),
    ("RuntimeError: Didn't find wheel for tensorrt-llm 0.12.0", "3.12"),
    ("cudaGetDevice(&device): forward compatibility was attempted on non supported HW", "driver"),
    (
        "ERROR: This container was built for NVIDIA Driver Release 535.86 or later, but\n"
        "       version 510.85.02 was detected and compatibility mode is UNAVAILABLE.",
        "driver",
    ),
    ("CUDA error: no kernel image is available for execution on the device", "8.0"),
    ("unexpected error: key 'use_context_fmha_for_generation' not found", "Build"),
    ("Cannot process new request: Prompt length (5056) exceeds maximum sequence length (2048)", "max_input_len"),
    ("Generation doesn't stop and goes until max_tokens is reached", "end_id"),
    ("never stops, or pads with `</s>`", "end_id"),
    ("garbage after KV cache quantization", "Switch the quantization"),
    ("INT8 KV caching + bf16 LLaMA engine generates garbage tokens", "Switch the quantization"),
    ("ValueError: Config name is missing.\nPlease pick one among the available configs: ['3.0.0']", "cnn_dailymail"),
    ("NotImplementedError: Unsupported dataset name or local repo directory: x.", "cnn_dailymail"),
    ("rank 0 using MpiPoolSession to spawn MPI processes", "OMPI_MCA_btl_tcp_if_include=lo"),
    ("hangs after `using MpiPoolSession`", "OMPI_MCA_btl_tcp_if_include=lo"),
    ("[TensorRT-LLM][INFO] Initializing MPI with thread mode 3", "OMPI_MCA_btl_tcp_if_include=lo"),
    ("AutoConfig cannot load the huggingface config.", "pins"),
    ("it is slower than vLLM or torch.compile", "same prompts"),
    ("tensorrt-llm 1.2.1 requires torch<=2.9.1, but you have torch 2.13.0 which is incompatible.", "of its own"),
    ("/usr/bin/ld: cannot find -ltorch: No such file or directory", "without spaces"),
    ("ImportError: x.so: failed to map segment from shared object", "TMPDIR"),
    ("why are the outputs of two backends: different output", "rounding"),
    ("the first request is slow", "one short request"),
    ("OMP_NUM_THREADS=64 python -m helpers bench", "free cores"),
    ("torch._inductor.exc.CppCompileError: C++ compile error", "helpers doctor"),
    ("BuildError: Compiling decode_b1 failed: x.cpp:1: fatal error: no such header", "CXX"),
    ("g++: fatal error: Killed signal terminated program cc1plus", "more memory"),
    ("[Errno 27] File too large", "helpers remove"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "way_out"), REPORTED, ids=[text[:40] for text, _ in REPORTED])
def test_a_reported_trouble_is_found(text, way_out):
    explanation = explain(text)
    assert len(explanation.troubles) == 1
    assert way_out in explanation.troubles[0].card.fix


BUILD_LOG = """\
[TensorRT-LLM] TensorRT-LLM version: 0.11.0
0.11.0
[07/02/2024-10:00:00] [TRT-LLM] [I] Set bert_attention_plugin to auto.
[07/02/2024-10:00:01] [TRT] [I] [MemUsageInit] Init CUDA: CPU +14, GPU +0, now: CPU 116, GPU 427 (MiB)
[07/02/2024-10:00:02] [TRT-LLM] [W] Invalid timing cache, using freshly created one
[07/02/2024-10:00:03] [TRT] [W] IElementWiseLayer with inputs A and B: first input has type Half but second has Float.
[07/02/2024-10:00:04] [TRT] [W] Tactic Device request: 66048MB Available: 32510MB. Device memory is insufficient.
[07/02/2024-10:00:05] [TRT] [W] UNSUPPORTED_STATE: Skipping tactic 0 due to insufficient memory on requested size
rank 0 using MpiPoolSession to spawn MPI processes
[TensorRT-LLM][INFO] Initializing MPI with thread mode 3
"""
BUILD_END = """\
[07/02/2024-10:01:05] [TRT] [I] Engine generation completed in 60.1 seconds.
[07/02/2024-10:01:06] [TRT-LLM] [I] Total time of building all engines: 00:01:06
"""


def test_a_log_tells_its_troubles_in_its_order_and_a_healthy_one_none():
    assert not explain(BUILD_LOG + BUILD_END)
    failed = (
        "\x1b[31m[07/02/2024-10:00:09] [E] 10: Could not find any \x1b[0mimplementation for node {ForeignNode[x]}\n"
        "AssertionError: Engine building failed, please check the error log.\r\nKilled\n"
    )
    first, second, third = explain(BUILD_LOG + failed).troubles
    assert "Could not find any implementation" in first.line
    assert "check the error log" in second.line
    assert third.line == "Killed"


UNRELATED = [
    "",
    " \n\t\r\n",
    "hello world",
    "INFO: 12 workers killed time while waiting; none was Killed by us",
    "java.lang.OutOfMemoryError: Java heap space",
    "[GC (Allocation Failure) 65536K->10748K] garbage collection took 3 ms",
    "KeyError: 'prompt'",
    "ModuleNotFoundError: No module named 'tensorrt_llm_backend_utils'",
    "Loading libnvinfer.so.10 and libcuda.so.1 and libmpi.so.40: ok",
    "npm ERR! unrecognized arguments",
    "usage: train.py [-h] [--max_output_len N]",
    "./a.out: symbol lookup error: ./a.out: undefined symbol: foo",
    "pip install numpy\nSuccessfully installed numpy-2.1.0",
    "ERROR: pip's dependency resolver: pandas 2 requires numpy>=1.26, but you have numpy 1.24 which is incompatible.",
    "The unit did not finish within the sprint",
    "NotImplementedError",
    "Prompt length is 5056",
    "the engine world is flat",
    "A text that mentions EngineNotFound and LimitError in the middle",
    "kernel: eth0: link up, 1000Mbps, full-duplex",
    "MEMORYERRORS: 0",
    "<html><body>502 Bad Gateway</body></html>",
]


@pytest.mark.parametrize("text", UNRELATED, ids=range(len(UNRELATED)))
def test_an_unrelated_text_finds_nothing(text):
    assert not explain(text).troubles


def test_in_what_the_other_notebooks_print_only_the_errors_shown_there_are_found():
    for path in sorted((PROJECT / "notebooks").glob("0[0-4679]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(o.get("text", "")) for cell in cells for o in cell.get("outputs", ()))
        for match in explain(text).troubles:
            assert "TensorRT says:" in match.line or match.line.startswith(match.card.error), match


def test_a_question_is_looked_for_only_where_a_person_asked():
    assert explain("The text does not stop.")
    assert not explain("The service does not stop.\nThe service was started.")


def test_an_error_of_the_course_names_its_kind():
    kinds = {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and kind is not CourseError}
    kinds = {name for name in kinds if issubclass(getattr(errors, name), CourseError)}
    known = {card.error for card in CARDS if any(words.startswith("^") for words in card.words)} - {"CourseError"}
    assert known == kinds
    for name in kinds:
        error = getattr(errors, name)("Something happened.", cause="A reason.", fix="A way out.")
        for text in (f"{name}: {error}", f"Traceback:\nhelpers.errors.{name}: {error}"):
            assert [match.card.error for match in explain(text).troubles] == [name]


def test_an_error_of_the_course_keeps_its_own_cause_and_fix():
    error = errors.StoreError(
        "Others may write to it.", cause="They could put theirs in its place.", fix="chmod go-w x"
    )
    (found,) = explain(f"StoreError: {error}\nanother line").troubles
    assert found.card.cause == "They could put theirs in its place." and found.card.fix == "chmod go-w x"
    (found,) = explain("StoreError: The folder cannot be written.").troubles
    assert "COURSE_ENGINES" in found.card.fix


@pytest.mark.parametrize(
    ("text", "cause", "fix"),
    [
        ("OSError: libgomp.so.1: cannot allocate memory in static TLS block", "no lack of memory", "LD_PRELOAD"),
        ("[E] magicTagRead == kMAGIC_TAG failed", "no TensorRT engine", "Build"),
        ("stdVersionRead == serializationVersion failed. Version tag does not match", "another version", "Build"),
        (
            "[E] getPluginCreator could not find plugin: EfficientNMS_TRT version: 1",
            "itself",
            "init_libnvinfer_plugins",
        ),
        ("Serialization assertion creator failed. Cannot deserialize plugin", "plugin", "init_libnvinfer_plugins"),
        (
            "[E] No importer registered for op: GridSample. Attempting to import as plugin.",
            "no such operation",
            "opset",
        ),
        ("my-org/model is not a local folder and is not a valid model identifier listed on", "Hub", "hf auth login"),
        ("libgomp: pthread_create failed: Operation not permitted", "container", "Update Docker"),
        ("libgomp: pthread_create failed: Resource temporarily unavailable", "limit", "ulimit -u"),
        (
            "ImportError: libpython3.12.so.1.0: cannot open shared object file",
            "shared library",
            "apt install libpython",
        ),
    ],
)
def test_messages_that_another_card_would_take(text, cause, fix):
    found = explain(text).troubles[0].card
    assert cause in found.cause and fix in found.fix


def test_each_error_of_a_log_keeps_its_own_cause_and_fix_also_two_of_a_kind():
    """A log of several commands has no empty line between them. The last one's fix was told for all."""
    kinds = [("RecipeError", "a"), ("ModelError", "b"), ("RecipeError", "c"), ("RecipeError", "c")]
    logged = [f"{kind}: What {n}.\nLikely cause: Cause {n}.\nFix: Fix {n}." for kind, n in kinds]
    troubles = explain("\n".join(["Building", *logged, "done"])).troubles
    assert [(match.line[-7:], match.card.cause, match.card.fix) for match in troubles] == [
        (f"What {n}.", f"Cause {n}.", f"Fix {n}.") for n in "abc"
    ]
    without, with_own = explain("StoreError: It cannot be written.\nRecipeError: No.\nFix: Take 2.").troubles
    assert "COURSE_ENGINES" in without.card.fix and with_own.card.fix == "Take 2."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vllm/_C.abi3.so: undefined symbol: _ZN3c104cuda29c10", ".venv-vllm"),
        ("ModuleNotFoundError: No module named 'tensorrt_llm'", "backend='tensorrt_llm'"),
        ("different text every time I run it", "seed"),
        ("ImportError: libtorch_cpu.so: failed to map segment from shared object", "memory"),
        ("Out of memory: Kill process 1234 (python) score 900", "more memory"),
    ],
)
def test_a_message_with_several_causes_is_told_with_all(text, words):
    (found,) = explain(text).troubles
    assert words in found.card.fix


@pytest.mark.parametrize("text", ["the build does not stop", "JupyterLab doesn't stop", "the kernel won't end"])
def test_what_does_not_stop_is_not_always_a_text(text):
    assert not explain(text)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("cc1plus: out of memory allocating 65536 bytes after a total of 1048576 bytes", "container more memory"),
        (
            "NCCL WARN Error: failed to extend /dev/shm/nccl-K8 to 9637892 bytes, error: No space left on device",
            "shm-size",
        ),
        ("RuntimeError: unable to write to file </torch_1234_0>: No space left on device (28)", "shm-size"),
        ("OSError: [Errno 28] No space left on device: '/srv/engines/x'", "helpers remove"),
    ],
)
def test_what_is_full_or_out_of_memory_is_told_apart(text, fix):
    (found,) = explain(text).troubles
    assert fix in found.card.fix


def test_every_card_is_complete_and_no_earlier_one_hides_it():
    for card in CARDS:
        assert card.cause and card.fix
        assert card.where in ("line", "last line", "question")
        assert issubclass(getattr(errors, card.error), CourseError)
        for words in card.words:
            text = f"{words} x".replace("$ x", "").removeprefix("^").replace("...", " ")
            first, *_ = explain(text).troubles
            same = [c for c in CARDS if c.cause == first.card.cause or words.lower() in map(str.lower, c.words)]
            assert card in same, words


def test_what_a_card_shows_is_in_the_notebook():
    for card in CARDS:
        if "section" in card.shown:
            number, section = card.shown.removeprefix("notebook ").split(", section ")
            (path,) = (PROJECT / "notebooks").glob(f"{number}_*.ipynb")
            assert f"## {section}. " in path.read_text(encoding="utf-8"), card.shown
        else:
            assert not card.shown or list((PROJECT / "notebooks").glob(f"{card.shown.removeprefix('notebook ')}_*"))


# ---- any input ------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "unit",
    [
        "x",
        "Prompt length (",
        ": line : ",
        "undefined symbol tensorrt_llm ",
        "\x1b[",
        "\x1b]",
        "key '",
        "\n",
        "Killed\r",
    ],
    ids=ascii,
)
def test_no_text_takes_longer_than_its_length(unit):
    """10 MB of what begins a card and never ends it: searched anew from each place, they would take days."""
    for text in (unit * (10**7 // len(unit)), "\n".join([unit * 10] * (10**6 // len(unit)))):
        explanation = explain(text)
        assert all(len(match.line) <= 500 for match in explanation.troubles)


@pytest.mark.timeout(120)
def test_a_long_log_is_searched_to_its_end(tmp_path):
    line = "[07/02/2024-10:00:03] [TRT] [I] Fused: /layers.7/Transpose_2 + /layers.7/Reshape_4 took 0.1 ms\n"
    path = tmp_path / "build.log"
    path.write_text(line * 100_000 + "Killed\n")  # 10 MB
    assert [match.line for match in explain(path).troubles] == ["Killed"]


def test_of_an_endless_log_the_end_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cards, "LONGEST", 100)
    path = tmp_path / "build.log"
    path.write_text("CUDA out of memory\n" + "x\n" * 500 + "Killed\n")
    assert [match.line for match in explain(path).troubles] == ["Killed"]
    with path.open() as log:
        monkeypatch.setattr("sys.stdin", log)
        cli.main(["explain", "--json"])
    assert [trouble["line"] for trouble in json.loads(capsys.readouterr().out)["troubles"]] == ["Killed"]


def test_text_in_any_encoding_is_read(tmp_path):
    path = tmp_path / "log"
    for content in (
        "Größe: 3\nKilled\n".encode("latin-1"),
        "Größe: 3\nKilled\n".encode("utf-16"),  # PowerShell's ">"
        b"\xff\xfe\x00Killed",  # that, cut in the middle: no line of it is known, and nothing fails
        b"\0" * 5000 + b"\nKilled\n",  # what a log that was cut while it was written begins with
    ):
        path.write_bytes(content)
        explain(path)
    path.write_bytes("Größe: 3\nKilled\n".encode("utf-16"))
    assert explain(path).troubles[0].line == "Killed"
    assert explain("\udcff\nKilled").troubles  # an argument that is no valid UTF-8


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "library.so"
    path.write_bytes(random.Random(0).randbytes(10_000) + b"Killed out of memory")
    with pytest.raises(InputError, match="is no text"):
        explain(path)
    os.mkfifo(tmp_path / "pipe")
    for wrong in (path.with_name("nowhere"), tmp_path, tmp_path / "pipe", Path("x\0"), None, 5, b"Killed"):
        with pytest.raises(InputError):
            explain(wrong)


def test_no_escape_sequence_reaches_the_terminal():
    shown = str(explain("CUDA out of memory \x1b]0;title\x07 \x1b[2J \x9b2J \x08\x00 more"))
    assert "CUDA out of memory" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)


def test_anchors_and_gaps():
    def hits(words, text):
        return [match.line for match in matches(text, [Card((words,), "cause", "fix")])]

    assert hits("^killed$", "a\n Killed \nb") == ["Killed"]
    assert not hits("^killed$", "Killed by\nwas Killed")
    assert hits("a...b...c", "x\na 1 b 2 c") and not hits("a...b...c", "a\nb\nc") and not hits("a...b", "b a")
    assert hits("^a...c$", "abc") and not hits("^a...c$", "abcd") and not hits("aa...aa", "aaa")


# ---- from a terminal ------------------------------------------------------------------------------------------


def command(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "helpers", "explain", *arguments], capture_output=True, **options)


def test_the_command_takes_words_a_file_or_standard_input(tmp_path):
    (tmp_path / "a b.log").write_text("first\nKilled\n")
    for done in (
        command("Killed"),
        command("CUDA", "error:", "out", "of", "memory"),
        command("a b.log", cwd=tmp_path),
        command(input=b"first\r\n\xff\nKilled"),
    ):
        assert done.returncode == 0 and b"What ends it:" in done.stdout, done
    unknown = command("something", "else")
    assert unknown.returncode == 1 and b"does not know" in unknown.stdout
    closed = command(input=b"\x7fELF" + bytes(range(32)) * 500)
    assert closed.returncode == 1 and b"no text" in closed.stderr


# ---- what notebooks 05 and 08 provoke: the text that it gives is known, and the mend mends it -----------------------


def test_a_worker_beyond_its_memory_is_killed_and_one_that_takes_less_at_a_time_is_not():
    with Worker("helpers.course.troubles") as worker:
        troubles.kill_beyond(150, worker.pid)
        with pytest.raises(WorkerError) as killed:
            worker.call("convert", megabytes=1200, parts=1)
    assert "more memory" in explain(str(killed.value)).troubles[0].card.fix
    with Worker("helpers.course.troubles") as worker:
        troubles.kill_beyond(150, worker.pid)
        assert worker.call("convert", megabytes=1200, parts=40) == "1200 MB in fp32 are 600 MB in fp16"


def test_a_worker_that_waits_for_ever_is_ended():
    with Worker("helpers.course.troubles") as worker, pytest.raises(WorkerError) as ended:
        worker.call("wait_for_partners", processes=2, time_limit=1)
    assert "py-spy" in explain(str(ended.value)).troubles[0].card.fix
    with Worker("helpers.course.troubles") as worker:
        assert worker.call("wait_for_partners", processes=1) == "all here"


def test_a_checkpoint_without_an_end_token_goes_on_after_the_end():
    folder = troubles.without_end_token()
    recipe = BuildRecipe(model=str(folder), backend="pytorch", max_input_len=8, max_seq_len=250)
    greedy = SamplingParams(temperature=0, max_tokens=200)
    (end,) = find_checkpoint("stories").config.eos_token_ids
    with load(recipe) as engine:
        (endless,) = engine.generate("Once upon a time", greedy)
    assert endless.finish_reason == "length" and end in endless.token_ids[:-1]
    (folder / "generation_config.json").unlink()
    troubles.without_end_token(str(folder))  # of a checkpoint that has only one of the two files
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with load(recipe) as engine:
        (mended,) = engine.generate("Once upon a time", greedy)
    assert mended.finish_reason == "stop"
    assert mended.token_ids == endless.token_ids[: endless.token_ids.index(end)]


def test_a_clone_without_its_compiled_part_hides_the_package_that_is_installed():
    clone = troubles.source_checkout("safetensors")
    command = [sys.executable, "-c", "import safetensors"]
    hidden = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert hidden.returncode == 1 and "_safetensors_rust" in hidden.stderr
    assert subprocess.run(command, cwd=clone.parent).returncode == 0


def test_an_old_name_of_a_field_says_what_took_its_place():
    with pytest.raises(RecipeError) as refused:
        BuildRecipe().replace(max_output_len=64)
    assert "max_seq_len" in refused.value.cause
    assert "max_input_len + " in explain(str(refused.value)).troubles[0].card.fix


def test_a_plugin_that_nobody_has_registered_is_explained():
    if why := missing():
        pytest.skip(why)
    with pytest.raises(BuildError, match="Plugin not found") as refused:
        build_onnx(troubles.graph_with_plugin(), quiet=True)
    assert "plugin" in refused.value.cause and "tensorrt_llm" in refused.value.fix  # no line of a module is to blame
    assert "Import tensorrt_llm" in explain(str(refused.value)).troubles[0].card.fix


def test_a_build_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    if why := missing():
        pytest.skip(why)
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    with Worker("helpers.course.troubles") as worker, pytest.raises(BuildError) as failed:
        worker.call("build_small", size=700, room=100_000)
    assert "helpers remove" in explain(str(failed.value)).troubles[0].card.fix
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]


def test_whatever_is_made_in_a_full_temporary_folder_is_told(monkeypatch):
    def refuse(*given, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(shutil, "copytree", refuse)
    for make in (troubles.broken_compiler, troubles.other_tokenizer, lambda: troubles.source_checkout("tokenizers")):
        with pytest.raises(BackendUnavailable, match="No space left"):
            make()


def test_folders_whose_names_are_not_utf8_are_told(tmp_path, monkeypatch):
    """An archive of another system leaves such names; libraries written in Rust open nothing there."""
    place = tmp_path / "caf\udce9"
    shutil.copytree(find_checkpoint("stories").folder, place / "model")
    with pytest.raises(ModelError, match="not valid UTF-8.*\n.*not UTF-8.*\nFix: Rename"):
        load(BuildRecipe(model=str(place / "model"), backend="pytorch"))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    with pytest.raises(BackendUnavailable, match="not UTF-8.*\n.*TMPDIR"):
        temporary_folder()


def test_a_copy_is_made_where_the_temporary_folder_was_cleared_away_and_a_full_one_is_told(tmp_path, monkeypatch):
    (tmp_path / "engine").mkdir()
    shutil.rmtree(troubles.copy_of(tmp_path / "engine").parent.parent)
    copy = troubles.copy_of(tmp_path / "engine")
    refused = [("weights", "copy", "[Errno 28] No space left on device")]
    monkeypatch.setattr(shutil, "copytree", lambda *_: (_ for _ in ()).throw(shutil.Error(refused)))
    with pytest.raises(BackendUnavailable, match="No space left") as full:
        troubles.copy_of(tmp_path / "engine")
    assert "disk is full" in full.value.cause and "TMPDIR" in full.value.fix
    assert [path for path in copy.parent.parent.iterdir() if path.is_dir()] == [copy.parent]  # no half copy


def test_what_a_killed_kernel_left_goes_with_the_next(tmp_path):
    code = "import os, signal; from helpers.course.troubles import broken_compiler; broken_compiler()"
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    for end in ("os.kill(os.getpid(), signal.SIGKILL)", ""):
        subprocess.run([sys.executable, "-c", f"{code}; {end}"], env=variables, cwd=PROJECT, check=not end)
        for left in tmp_path.iterdir():
            os.utime(left, (0, 0))
    assert not list(tmp_path.iterdir())
