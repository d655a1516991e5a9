"""The promises about engines, each tried at random: see tests/promises.py."""

import contextlib
import dataclasses
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import GREEDY, PROMPTS
from test_store import FORKS, RECIPE, FakeBackend, engines, fork, leftovers  # noqa: F401  (engines is a fixture)

from helpers import backends, build, cli, engine, load, store
from helpers.backends.tensorrt.builder import missing
from helpers.bench import claims, records, tables
from helpers.display import Picture
from helpers.engine import inspect
from helpers.errors import CourseError, EngineCorrupt, InputError
from helpers.maintain import notebooks

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs fork and signals")
WITH_TENSORRT = pytest.mark.skipif(bool(missing()), reason="needs TensorRT: pip install tensorrt-rtx")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) if os.name == "posix" else ()


def slow(folder):
    """A compiler that writes its files bit by bit."""
    for number in range(10):
        with (folder / f"part{number % 3}").open("ab") as file:
            file.write(b"x" * 1000)
        time.sleep(0.002)


def build_again_and_again(recipe):
    """In a fork: build the same engine until somebody ends it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        build(recipe, force=True, quiet=True)


# What lies in a folder of engines once a build has begun, has written its first file, has published.
MOMENTS = (".building-*", ".building-*/*", "*/manifest.json")


def wait_for(moment, folder):
    """So that a kill meets a build, also on a busy machine. Four minutes at most."""
    for _ in range(24_000):
        if glob.glob(moment, root_dir=folder):  # noqa: PTH207  (Path.glob fails where a folder vanishes meanwhile)
            return
        time.sleep(0.01)
    pytest.fail(f"No build has come as far as {moment}.")


@pytest.fixture
def fake(engines, monkeypatch):  # noqa: F811
    backend = FakeBackend(slow)
    monkeypatch.setattr(backends, "module", lambda name: backend)
    store.remove(build(RECIPE, quiet=True))  # what a build imports, once: each fork would take seconds for it
    return backend


@POSIX
@FORKS
@pytest.mark.promise("A build that is killed at any moment leaves no half-written engine", 20, 500)
def test_a_killed_build_lists_nothing_that_is_not_whole(fake, engines, attempts):  # noqa: F811
    torn = []

    def one(rng):
        process = fork(build_again_and_again, RECIPE)
        wait_for(MOMENTS[0], engines)
        time.sleep(rng.uniform(0, 0.3))
        kind = rng.choice(SIGNALS)
        os.kill(process.pid, kind)
        process.join(5)
        if process.exitcode is None and kind == signal.SIGINT:  # it came where Python drops it
            os.kill(process.pid, kind)
        process.join(20)
        assert process.exitcode is not None
        torn.extend(engines.glob(".building-*"))
        for folder in store.list_engines():
            store.verify(folder, store.read_manifest(folder), thorough=True)
        folder = build(RECIPE, force=True, quiet=True)
        assert leftovers(engines) == [folder.name]

    attempts(one)
    assert torn  # or no kill has met a build


# Build one engine again and again, and say so once everything is imported.
COMPILERS = {
    "aot": """
        from helpers import BuildRecipe, build
        import torch
        recipe = BuildRecipe(model=sys.argv[1], device="cpu", max_batch_size=1, max_input_len=16, max_seq_len=48,
                             optimization_level=0)
        one = lambda: build(recipe, force=True, quiet=True)""",
    "tensorrt": """
        from helpers.engine import build_module
        import torch, helpers.backends.tensorrt.modules
        torch.manual_seed(0)  # the same engine in every process
        layer = torch.nn.Linear(4, 4)
        one = lambda: build_module(layer, (torch.ones(1, 4),), "fp16", force=True, quiet=True)""",
}
AGAIN = "import sys\n{}\nprint('started', flush=True)\nwhile True:\n    one()"
SECONDS = {"aot": 5, "tensorrt": 1}  # the longest time from such a moment to the kill


def processes_of(folder) -> list[psutil.Process]:
    """What works for a folder of engines, whoever its parent is by now."""
    working = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("COURSE_ENGINES") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                working.append(process)
    return working


@POSIX
@pytest.mark.parametrize("compiler", [pytest.param("aot"), pytest.param("tensorrt", marks=WITH_TENSORRT)])
@pytest.mark.promise("The same, for real compilers: aot and TensorRT", 1, 60)
def test_a_killed_compiler_leaves_nothing(compiler, engines, tiny_llama, tmp_path, monkeypatch, attempts):  # noqa: F811
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))

    def one(rng):
        code = AGAIN.format(textwrap.dedent(COMPILERS[compiler]))
        command = [sys.executable, "-c", code, str(tiny_llama)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout.readline() == b"started\n"
            wait_for(rng.choice(MOMENTS), engines)
            time.sleep(rng.uniform(0, SECONDS[compiler]))
            process.send_signal(rng.choice(SIGNALS))
            process.wait(30)
        _, alive = psutil.wait_procs(processes_of(engines), 20)
        assert not alive
        whole = store.list_engines()
        for folder in whole:
            store.verify(folder, store.read_manifest(folder), thorough=True)
        with store.building("next"):  # it sweeps
            pass
        left = list(scratch.iterdir())
        for path in left:  # or every later attempt would fail for it
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert leftovers(engines) == sorted(folder.name for folder in whole) and not left
        for folder in whole:
            store.remove(folder)

    attempts(one)


def build_once(recipe, side):
    def work(folder):
        with side.open("a") as log:
            log.write("x")
        slow(folder)

    backends.module = lambda name: FakeBackend(work)
    build(recipe, quiet=True)


@POSIX
@FORKS
@pytest.mark.promise("The same recipe by eight processes is built once", 2, 50)
def test_eight_processes_build_once(fake, engines, tmp_path, attempts):  # noqa: F811
    def one(rng):
        side = tmp_path / f"{rng.random()}"
        builders = [fork(build_once, RECIPE, side) for _ in range(8)]
        for builder in builders:
            builder.join(60)
        assert [builder.exitcode for builder in builders] == [0] * 8
        assert side.read_text() == "x"
        (folder,) = store.list_engines()
        store.remove(folder)

    attempts(one)


def damage(file: Path, rng) -> str:
    """Change a file in some way; what was done."""
    content = file.read_bytes()
    kind = rng.choice(("bit", "cut", "longer", "gone"))
    if kind == "gone":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[: rng.randrange(len(content.rstrip()))])
    elif kind == "longer":
        file.write_bytes(content + b"x" + rng.randbytes(rng.randrange(9)))  # of JSON, spaces alone would change nothing
    else:
        place = rng.randrange(len(content.rstrip()))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
    return f"{file.name}: {kind}"


@pytest.mark.promise("Bytes that were changed on disk are found before native code runs", 40, 3000)
def test_a_damaged_engine_is_never_loaded(own_engines, attempts, monkeypatch, tmp_path):
    whole = shutil.copytree(own_engines, tmp_path / "whole")

    def one(rng):
        shutil.rmtree(own_engines)
        shutil.copytree(whole, own_engines)
        file = rng.choice(sorted(path for path in own_engines.rglob("*") if path.is_file()))
        what = damage(file, rng)
        with pytest.raises(CourseError):
            load(own_engines).close()
            print(what)

    attempts(one)


ODD = [None, True, -1, 10**30, 1.5, "", "\0", "../..", "\x1b[2J", [], [1], {}, {"x": None}, "x" * 10_000]


def mutate(value, rng):
    """The same JSON with one thing in it replaced by an odd one, taken out or put in."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        changed = {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.8:
            changed[key] = mutate(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], mutate(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD)


@pytest.mark.promise("A manifest that says anything else, sealed anew, is refused in our words or works", 40, 10_000)
def test_any_manifest_is_refused_or_works(own_engines, attempts, capsys):
    manifest = json.loads((own_engines / "manifest.json").read_text())

    def answer(loaded):
        return loaded.generate([5, 6, 7], GREEDY)[0].token_ids

    def use(folder):
        with load(folder) as loaded:  # which weights are read in which order, only who built it knows
            assert store.read_manifest(folder)["details"] != manifest["details"] or answer(loaded) == right

    with load(own_engines) as loaded:
        right = answer(loaded)

    def one(rng):
        changed = mutate(manifest, rng)
        if isinstance(changed, dict):
            store.save_manifest(own_engines, changed)
        else:
            (own_engines / "manifest.json").write_text(json.dumps(changed))
        assert cli.main(["list"]) == 0 and "\x1b" not in capsys.readouterr().out
        for call in (inspect, use):
            try:
                call(own_engines)
            except CourseError as error:
                assert error.what and "\x1b" not in str(error)

    attempts(one)


CHANGES = {"max_seq_len": 40, "max_batch_size": 3, "max_input_len": 8, "precision": "bf16", "fusion": {"qkv": False}}


@pytest.mark.parametrize("name", CHANGES)
def test_a_recipe_that_is_not_the_one_that_was_built_is_refused(fake, engines, name):  # noqa: F811
    """The native code was built for its sizes: with others it reads and writes beside its cache."""
    folder = build(RECIPE, quiet=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["recipe"][name] = CHANGES[name]
    store.save_manifest(folder, manifest)
    with pytest.raises(EngineCorrupt, match=f"{name} differs"):
        load(folder)


WORDS = [
    "build", "list", "inspect", "verify", "generate", "remove", "doctor", "explain", "--json", "--help", "", "-", "--",
    "--max-tokens", "0", "-1", "1e9", "nan", "stories", "../..", "\x1b[2J", "\udce9", "x" * 300, "--precision", "int9",
    "--seed", "--temperature", "--stop", "--kernels", "nowhere.toml", "--options", "--force", "~nobody",
]  # fmt: skip


@pytest.mark.promise("Any command line is done, or refused in our words", 60, 10_000)
def test_any_command_line_is_done_or_refused(engines, attempts, monkeypatch, capsys, tmp_path):  # noqa: F811
    monkeypatch.setattr(engine, "_run", lambda job, force: tmp_path)
    monkeypatch.setattr("helpers.machine.doctor.main", lambda **_: {})
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def one(rng):
        words = [rng.choice(WORDS[:8]), *(rng.choice(WORDS) for _ in range(rng.randrange(5)))]
        try:
            assert cli.main(words) in (0, 1)
        except SystemExit as end:
            assert end.code in (0, 2)  # argparse's own
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err and "\x1b" not in shown.out

    attempts(one)


def stays_flat(attempts, use):
    """What a process holds does not grow."""
    held = []

    def one(rng):
        use(rng)
        held.append(psutil.Process().memory_info().rss)

    attempts(one)
    assert_flat(held)


def assert_flat(held):
    """The most in the end, beside what was held after a quarter."""
    early, late = held[len(held) // 4], max(held[-10:])
    assert late < early * 1.02 + 2**22, f"{early / 1e6:.1f} MB, then {late / 1e6:.1f} MB"


@pytest.mark.promise("Generations take no memory that they do not give back", 200, 2000)
def test_memory_stays_flat_while_generating(aot, attempts):
    stays_flat(attempts, lambda rng: aot.generate(rng.choice(PROMPTS), GREEDY))


@pytest.mark.promise("Loading and closing engines takes no memory that is not given back", 10, 200)
def test_memory_stays_flat_while_loading_and_closing(tiny_engine, attempts):
    def use(rng):
        with load(tiny_engine) as loaded:
            loaded.generate([1, 2, 3], GREEDY)

    stays_flat(attempts, use)


def test_memory_that_grows_is_noticed():
    noise = [10**9 + 10**6 * (i % 3) for i in range(200)]
    assert_flat(noise)
    with pytest.raises(AssertionError, match="MB, then"):
        assert_flat([held + 500_000 * i for i, held in enumerate(noise)])


@pytest.mark.promise("Four threads on one engine: nobody gets another one's text", 3, 100)
def test_four_threads_get_their_own_texts(aot, attempts):
    alone = {prompt: aot.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS}

    def one(rng):
        asked = rng.sample(PROMPTS, 4)
        answers = {}
        threads = [
            threading.Thread(target=lambda p=p: answers.update({p: aot.generate(p, GREEDY)[0].token_ids}))
            for p in asked
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert answers == {prompt: alone[prompt] for prompt in asked}

    attempts(one)


@pytest.mark.promise("Any text is answered or refused in our words", 100, 10_000)
def test_any_prompt_is_answered_or_refused(tiny_engine, attempts):
    with load(tiny_engine) as loaded:

        def one(rng):
            text = "".join(
                chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x110000)))) for _ in range(rng.randrange(9))
            )
            try:
                loaded.generate(text, GREEDY)
            except CourseError as error:
                assert error.what

        attempts(one)


@pytest.mark.promise("Any record of a benchmark is refused in our words, or can be shown", 100, 10_000)
def test_any_record_is_refused_or_shown(attempts, tmp_path):
    sound = records.read(records.REFERENCES / "cpu-stories.json")
    whole, path = dataclasses.asdict(sound), tmp_path / "record.json"

    def one(rng):
        path.write_text(json.dumps(mutate(whole, rng)))
        try:
            record = records.read(path)
        except CourseError as error:
            assert error.what and "\x1b" not in str(error)
            return
        calls = [tables.table, tables.overview, claims.judge, partial(claims.aspects, lines={})]
        calls += [partial(show, theirs=sound) for show in (claims.guide, tables.compare, tables.beside)]
        calls += [partial(records.merge, sound)]
        if rng.random() < 0.02:
            calls += [tables.tpot, tables.batching, tables.first_token, tables.memory]
        for call in calls:
            with contextlib.suppress(InputError):  # other work, or nothing measured: said in our words
                shown = call(record)
                shown.png() if isinstance(shown, Picture) else None
                assert "\x1b" not in str(shown)
        assert records.read(records.save(record, path)) == record

    attempts(one)


@pytest.mark.filterwarnings("ignore:Cell is missing an id")
@pytest.mark.promise("Any notebook is refused in our words, or can be judged and written", 100, 10_000)
def test_any_notebook_is_refused_or_judged(attempts, tmp_path):
    whole = json.loads((notebooks.NOTEBOOKS / "00_start_here.ipynb").read_text(encoding="utf-8"))

    def one(rng):
        (tmp_path / "00_x.ipynb").write_text(json.dumps(mutate(whole, rng)))
        try:
            nb = notebooks.read(tmp_path / "00_x.ipynb")
        except CourseError as error:
            assert error.what and "\x1b" not in str(error)
            return
        notebooks.judge(nb, "00_x")
        notebooks.tidy(nb)
        notebooks.write(nb, tmp_path / "00_y.ipynb")

    attempts(one)
