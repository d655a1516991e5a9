"""The command line and the two example scripts, on a small engine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import limits

from helpers import BuildRecipe, basic, store
from helpers import recipe as recipes
from helpers.backends.base import Engine
from helpers.bench.records import REFERENCES
from helpers.cli import main
from helpers.engine import locate
from helpers.errors import InputError

ROOT = Path(__file__).parents[2]
SMALL = ["--max-batch-size", "1", "--max-input-len", "16", "--max-seq-len", "48", "--device", "cpu"]


@pytest.fixture
def engine(own_engines) -> str:
    """The name of the only engine there is."""
    return own_engines.name


def run_in_shell(*command: str | bytes) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def run_module(*arguments: str | bytes) -> subprocess.CompletedProcess:
    return run_in_shell(sys.executable, "-m", *arguments)


def told(done: subprocess.CompletedProcess) -> str:
    """What stands on the error stream, without the lines that a start of more than two seconds is shown by."""
    return re.sub(r"Starting PyTorch, once in a process\n( *import +[\d.]+ s\n)?", "", done.stderr)


def test_build_takes_a_recipe_file_or_options_and_prints_the_engines_name(engine, tiny_llama, tmp_path, capsys):
    """Both say what the tiny engine was built from, so nothing is compiled."""
    recipe = BuildRecipe(model=str(tiny_llama), **limits(max_batch_size=1, max_input_len=16, max_seq_len=48))
    assert main(["build", str(recipes.write(recipe, tmp_path / "r.toml"))]) == 0
    assert capsys.readouterr().out.strip() == engine
    assert main(["build", "--model", str(tiny_llama), *SMALL]) == 0
    assert capsys.readouterr().out.strip() == engine


def test_options_overrule_the_recipe_file(tmp_path, capsys):
    path = recipes.write(BuildRecipe(**limits()), tmp_path / "r.toml")
    assert main(["build", str(path), "--precision", "fp64"]) == 1 and "precision is 'fp64'" in capsys.readouterr().err


def test_list_shows_each_engine_with_its_size_and_store_and_a_damaged_one_as_damaged(
    engine, capsys, monkeypatch, tmp_path
):
    folder = locate(engine)
    assert main(["list"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(engine)]
    assert f"{store.size(folder) / 1e6:.1f}" in line and line.endswith(str(folder.parent))
    (folder / "manifest.json").write_text("{")
    assert main(["list"]) == 0 and f"of another version; helpers verify {engine}" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path / "none"))
    assert main(["list"]) == 0 and "helpers build" in capsys.readouterr().out


def test_inspect_shows_every_graph_and_file(engine, capsys):
    assert main(["inspect", engine[:8]]) == 0
    shown = capsys.readouterr().out
    for word in ("prefill", "decode_b1", "operations", "weights.safetensors", "decode_b1.pt2", "the largest kernels"):
        assert word in shown


def test_verify_reads_all_and_names_what_is_damaged(engine, capsys):
    assert main(["verify"]) == 0 and main(["verify", engine[:8]]) == 0
    assert capsys.readouterr().out == f"whole    {engine}\n" * 2
    weights = locate(engine) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert main(["verify"]) == 1
    assert "weights.safetensors is not the file that was built" in capsys.readouterr().out
    (locate(engine) / store.MANIFEST).unlink()  # as in a copy that was cut short
    assert main(["verify"]) == 1 and f"damaged  {engine} has no manifest.json" in capsys.readouterr().out


def test_generate_prints_prompt_and_answer_and_streams_the_same(engine, capsys):
    options = ["--max-tokens", "8", "--seed", "3"]
    assert main(["generate", engine, "Once upon", *options]) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("Once upon") and "[8 tokens, length; TTFT" in plain
    assert main(["generate", engine, "Once upon", *options, "--stream"]) == 0
    assert capsys.readouterr().out.strip() == plain.rsplit("\n  [", 1)[0].strip()


def test_remove_deletes_what_it_names(engine, capsys):
    assert main(["remove", engine]) == 0
    assert capsys.readouterr().out == f"removed {engine}\n" and store.list_engines() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "nowhere.toml"], "no recipe file 'nowhere.toml'"),
        (["build", "--model", "nothing"], "no model 'nothing'"),
        (["build", "--max-batch-size", "0"], "max_batch_size is 0"),
        (["build", "--backend", "pytorch"], "nothing to build"),
        (["inspect", "nothing"], "no engine 'nothing'"),
        (["generate", "nothing", "x"], "no engine 'nothing'"),
        (["generate", "tiny", ""], "empty"),
        (["generate", "tiny", "x", "--temperature", "nan"], "temperature is nan"),
        (["generate", "tiny", "x", "--max-tokens", "48"], "max_seq_len=48"),
        (["generate", "tiny", "x", "y"], "max_batch_size=1"),
        (["remove", "nothing"], "no engine 'nothing'"),
        (["remove", ""], "no engine ''"),
    ],
    ids=" ".join,
)
def test_an_error_is_told_in_our_words_with_a_fix_and_exit_status_1(engine, arguments, words, capsys):
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert words in told and "Fix:" in told and "Traceback" not in told


def test_a_models_control_characters_do_not_reach_the_terminal(engine, capsys, monkeypatch):
    monkeypatch.setattr(Engine, "detokenize", lambda self, ids, *_: "\x1b[2J\x9b31m\a" * bool(ids))
    for options in ([], ["--stream"]):
        assert main(["generate", engine, "Once\x1b[1m", "--max-tokens", "2", *options]) == 0
        shown = capsys.readouterr().out
        assert "\\x1b[1m" in shown and not {"\x1b", "\x9b", "\a"} & set(shown)


def test_a_reader_that_has_enough_ends_the_command_quietly(engine):
    code = f"import sys; from helpers.cli import main; sys.exit(main(['inspect', {engine!r}, '--kernels', '100000']))"
    command = f'"{sys.executable}" -c "{code}" | true'  # which ends at once, and has read nothing
    done = run_in_shell("bash", "-o", "pipefail", "-c", command)
    assert done.returncode == 141 and told(done) == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        ("helpers list > /dev/full", 1, "The operating system refused"),
        ("helpers list >&-", 0, ""),
        ("helpers list <&- >&- 2>&-", 0, ""),
        ("helpers run 00 --out /dev/null", 1, "The operating system refused"),
        ("helpers run 00 --out /dev/null >&-", 1, "The operating system refused"),
        ("helpers.build_engine --help > /dev/full", 0, ""),  # argparse's own
        ("helpers.build_engine --model tiny > /dev/full", 1, "no model 'tiny'"),
    ],
)
def test_output_that_cannot_be_written_is_told_in_our_words(engine, command, status, words):
    done = run_in_shell("bash", "-c", f'"{sys.executable}" -m {command}')
    assert done.returncode == status and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("errors_go", ["2>&-", "2>/dev/full"])
def test_an_error_in_json_stands_alone_wherever_its_words_go(own_engines, errors_go):
    done = run_in_shell("bash", "-c", f'"{sys.executable}" -m helpers inspect nosuch --json {errors_go}')
    assert done.returncode == 1 and json.loads(done.stdout)["error"]["type"] == "EngineNotFound"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_that_lacks_characters_gets_them_spelled_out(engine, encoding, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    done = run_module("helpers", "generate", engine, "Once \N{PARTY POPPER}", "--max-tokens", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once \\U0001f389") and told(done) == ""
    done = run_module("helpers.basic", "--engine", engine, "--max-tokens", "2", "Once \N{PARTY POPPER}")
    assert done.returncode == 0 and "\\U0001f389" in done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["inspect"], ["remove"], ["build"], ["build", "--model"]], ids=" ".join)
def test_arguments_that_are_no_text_are_refused_in_our_words(engine, arguments):
    done = run_module("helpers", *arguments, b"caf\xe9")
    assert done.returncode in (1, 2) and "caf" in done.stderr and "Traceback" not in done.stderr


def test_bench_refuses_a_place_for_its_record_before_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("helpers.bench.run.run", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "missing" / "record.json", tmp_path / "file" / "record.json", tmp_path):
        assert main(["bench", "--out", str(place)]) == 1
        assert "Fix:" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


RECORD = str(REFERENCES / "cpu-stories.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--compare", RECORD, RECORD, "--out", "x.json"], "out was given"),
        (["--compare", RECORD, RECORD, "--repeats", "3"], "repeats was given"),
        (["--batch", "1,4", "--max-batch", "2"], "max_batch_size=2"),
        (["--decode-batch-sizes", "9"], "max_batch_size=4"),
        (["--input", "70", "--max-input", "64"], "max_input_len=64"),
        (["--output", "100", "--max-seq", "64"], "max_seq_len=64"),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_bench_follows_each_option_or_refuses_it(options, words, capsys):
    assert main(["bench", *options]) == 1
    told = capsys.readouterr().err
    assert words in told and "Fix:" in told


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ([], (4, 64, 256)),
        (["--batch", "8", "--input", "100", "--output", "300"], (8, 100, 400)),
        (["--max-batch", "1", "--max-input", "16", "--max-seq", "80"], (1, 16, 80)),
    ],
    ids=["defaults", "large work", "given"],
)
def test_bench_makes_room_for_the_work_where_no_limit_is_given(options, limits, monkeypatch, capsys):
    seen = []

    def run(workload, *_, **__):
        seen.append((workload.max_batch_size, workload.max_input_len, workload.max_seq_len))
        raise InputError("enough")

    monkeypatch.setattr("helpers.bench.run.run", run)
    assert main(["bench", *options]) == 1 and seen == [limits]


def test_interrupting_says_that_nothing_is_left(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "list_engines", interrupt)
    assert main(["list"]) == 130
    assert "nothing half-built" in capsys.readouterr().err


def test_in_a_folder_that_is_gone_nothing_is_begun(engine, tmp_path):
    """A library of PyTorch ends a process that loads it there."""
    benchmark = ["bench", "--backends", "pytorch"]
    for command in (
        ["generate", engine, "Hello"],
        ["build", "--model", "stories", *SMALL],
        benchmark,
        ["model", "list"],
    ):
        (tmp_path / "gone").mkdir()
        code = f"import os, sys; from helpers.cli import main; os.rmdir(os.getcwd()); sys.exit(main({command}))"
        path = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "gone", env=path, capture_output=True)
        assert done.returncode == 1 and b"StoreError: The folder that this Python works in is gone" in done.stderr


def test_importing_pytorch_is_shown_where_it_takes_long(engine):
    code = f"from helpers import load, progress; progress.SILENT_S = 0.01; load({engine!r}).close()"
    assert "Starting PyTorch" in run_in_shell(sys.executable, "-c", code).stderr


def test_importing_helpers_loads_neither_torch_nor_a_compiler_nor_numpy():
    heavy = "torch transformers numpy tokenizers safetensors IPython matplotlib"
    code = f"import sys, helpers, helpers.cli; print([m for m in {heavy.split()} if m in sys.modules])"
    assert run_in_shell(sys.executable, "-c", code).stdout == "[]\n"


def test_every_command_that_a_text_names_is_there():
    """Such as the one that a recipe's comment gives: it named one that there had been once."""
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "engines" / "recipes").glob("*.toml")]
    texts += (ROOT / "notebooks").glob("*.ipynb")
    named = {
        (match[1], match[2])
        for path in texts
        for match in re.finditer(r"(?:`|: | {4}|bin/)helpers ([a-z][a-z-]+)(?: ([a-z]+))?", path.read_text())
    }
    assert {("model", "get"), ("build", "engines")} <= named
    nested = ("model", "course", "env")
    for command in {(one, two) if one in nested else (one,) for one, two in named}:
        with pytest.raises(SystemExit) as done:
            main([*command, "--help"])
        assert done.value.code == 0, command


def test_every_name_of_the_face_is_there():
    import helpers

    assert all(callable(getattr(helpers, name)) for name in helpers.__all__)
    assert set(helpers.__all__) <= set(dir(helpers))
    with pytest.raises(AttributeError, match="nothing"):
        helpers.nothing  # noqa: B018


def test_the_example_scripts_build_and_then_generate(engine, tiny_llama):
    options = ["--model", str(tiny_llama), "--max-batch-size", "1", "--max-input-len", "16", "--max-seq-len", "48"]
    built = run_module("helpers.build_engine", *options)
    assert built.returncode == 0, built.stderr
    assert built.stdout.startswith("Engine: tiny-llama-aot-fp32-b1-")
    assert f"python -m helpers.basic --engine {store.list_engines()[-1].name}" in built.stdout
    answered = run_module("helpers.basic", "--max-tokens", "8", "--engine", engine, "Once upon a time", "One day")
    assert answered.returncode == 0, answered.stderr
    first, *lines = answered.stdout.strip().splitlines()
    assert first == f"Engine: {engine}"
    assert [line.split(",")[0] for line in lines] == ["Prompt: 'Once upon a time'", "Prompt: 'One day'"]
    assert all("Generated text: " in line for line in lines)


def test_the_example_scripts_fail_in_our_words(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path))
    done = run_module("helpers.basic")
    assert done.returncode == 1 and "no engine" in done.stderr and "Traceback" not in done.stderr


def test_the_example_generates_with_the_model_built_last(engine, monkeypatch):
    """Whatever modules were built after it: these answer no prompts."""
    module = Path("block-tensorrt")
    kinds = {module: {"identity": {"kind": "module"}}}
    monkeypatch.setattr(basic, "list_engines", lambda: [*store.list_engines(), module])
    monkeypatch.setattr(basic, "read_manifest", lambda folder: kinds.get(folder) or store.read_manifest(folder))
    assert basic.built_last() == engine


def test_the_example_scripts_are_short_enough_to_read():
    for name in ("basic", "build_engine"):
        assert len((ROOT / "helpers" / f"{name}.py").read_text().splitlines()) < 60
