"""Contract tests of what notebooks show of TensorRT-LLM 1.2.1: each piece of Python is executed against the stand-in
(contract/README.md), each command's flags are compared with the recorded ones. None of it ran with TensorRT-LLM.
"""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import STANDINS

nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not in this environment")

from helpers.maintain import notebooks
from helpers.model.checkpoint import BUNDLED
from helpers.recipe import tensorrt_llm as tensorrt_llm_options

COMMITTED = sorted(notebooks.NOTEBOOKS.glob("*.ipynb"))
ENGINE = """
from tensorrt_llm import BuildConfig
from tensorrt_llm._tensorrt_engine import LLM as _LLM
_made = _LLM(model="TinyLlama/TinyLlama-1.1B-Chat-v1.0", build_config=BuildConfig(max_seq_len=256, max_input_len=64))
_made.save("tinyllama_engine")
_made.shutdown()
"""
PROMPTS = 'prompts = ["Once upon a time", "Hello, my name is"]\nprompt = prompts[0]\n'
# What a piece needs that the notebook says elsewhere; and what has to be closed before the next piece.
AROUND = {
    "generate-imports-trtllm": (ENGINE + PROMPTS, ""),
    "generate-stream-trtllm": (
        "from tensorrt_llm import SamplingParams as _P\nsampling_params = _P(max_tokens=5)\n"
        'llm = _LLM(model="tinyllama_engine", tokenizer="TinyLlama/TinyLlama-1.1B-Chat-v1.0")',
        "llm.shutdown()",
    ),
    # The bundled model's tokenizer, which stands for the named one's here, has no chat template.
    "own-trtllm-python": (
        "from transformers import AutoTokenizer as _T\n_T.from_pretrained('x').chat_template = "
        "\"{% for m in messages %}{{ m['content'] }}{% endfor %}\"",
        "_T.from_pretrained('x').chat_template = None",
    ),
}


def blocks(path, language):
    """(cell id, source) of each fenced block in the notebook's text; solutions of exercises are about our own calls."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and "<summary>Solutions</summary>" not in cell.source:
            for source in re.findall(rf"```{language}\n(.*?)```", cell.source, re.S):
                yield cell.id, source


def in_standin(pieces, folder):
    return subprocess.run(
        [sys.executable, str(STANDINS / "run_snippets.py"), str(BUNDLED)],
        input=json.dumps(pieces),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(STANDINS)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("path", [p for p in COMMITTED if list(blocks(p, "python"))], ids=lambda p: p.stem)
def test_shown_python_runs_against_the_stand_in(path, tmp_path):
    pieces = []
    for cell, source in blocks(path, "python"):
        before, behind = AROUND.get(cell, ("", ""))
        pieces += [("prepare", before), (cell, source), ("clean up", behind)]
    done = in_standin(pieces, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_test_finds_a_wrong_argument(tmp_path):
    wrong = "from tensorrt_llm import SamplingParams\nSamplingParams(max_new_tokens=5)"
    done = in_standin([("x", wrong)], tmp_path)
    assert done.returncode != 0 and "max_new_tokens" in done.stderr


def commands():
    for path in COMMITTED:
        for cell, source in blocks(path, "bash"):
            for line in source.replace("\\\n", " ").splitlines():
                if line.startswith("trtllm-"):
                    yield pytest.param(line, id=cell)


@pytest.mark.parametrize("line", list(commands()))
def test_shown_commands_have_the_flags_of_1_2_1(line):
    """commands/build.py, bench.py, serve.py and bench/ of NVIDIA/TensorRT-LLM."""
    sys.path.insert(0, str(STANDINS))
    try:
        from commands import BACKENDS, FLAGS
    finally:
        sys.path.pop(0)
    words = shlex.split(line)
    key = next(k for k in FLAGS if k[0] == words[0] and set(k[1:]) <= set(words))
    known = set(FLAGS[key])
    if key == ("trtllm-build",):
        known |= tensorrt_llm_options.PLUGINS.keys() | tensorrt_llm_options.REFUSED.keys()
    flags = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    assert flags and set(flags) <= known
    if "--backend" in words:
        assert words[words.index("--backend") + 1] in BACKENDS


def test_build_bench_and_serve_are_all_shown():
    assert {param.values[0].split()[0] for param in commands()} == {"trtllm-build", "trtllm-bench", "trtllm-serve"}


OWN = [
    ("00_start_here", ["start-own"]),
    ("02_build_an_engine", ["build-own"]),
    ("03_generate", ["generate-own", "generate-own-runner"]),
]


@pytest.mark.parametrize(("notebook", "cells"), OWN)
def test_where_tensorrt_llm_is_the_notebooks_own_cells_use_it(standin, notebook, cells, capsys):
    """The cells as they stand, with what the cells before them made."""
    from transformers import AutoTokenizer

    from helpers import BuildRecipe, SamplingParams, backends, build, load
    from helpers.course.pictures import show_text

    prompts = ["Once upon a time", "Long ago"]
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)  # as the notebook
    names = {
        "recipe": BuildRecipe(max_batch_size=4, max_input_len=64, max_seq_len=256),
        "greedy": SamplingParams(temperature=0, max_tokens=8),
        "sampling": SamplingParams(temperature=0.8, seed=1, max_tokens=8),
        "prompts": prompts,
        "tokenizer": tokenizer,
        "batch_input_ids": [tokenizer.encode(prompt) for prompt in prompts],
        **{"backends": backends, "build": build, "load": load, "show_text": show_text},
    }
    path = notebooks.NOTEBOOKS / f"{notebook}.ipynb"
    sources = {cell.id: cell.source for cell in nbformat.read(path, as_version=4).cells}
    for cell in cells:
        exec(compile(sources[cell], cell, "exec"), names)
    assert names["chosen"] == "tensorrt_llm"
    assert capsys.readouterr().out
