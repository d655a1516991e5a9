"""engines/: published whole or not at all, found again or explained, and never loaded when damaged."""

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Scripted, limits, whole

from helpers import BuildRecipe, SamplingParams, backends, build, cli, digests, load, store
from helpers import recipe as recipes
from helpers.backends.report import EngineReport, write_report
from helpers.bench import records
from helpers.engine import inspect, load_plan, locate, recipe_of
from helpers.errors import (
    BackendUnavailable,
    BuildError,
    CourseError,
    EngineCorrupt,
    EngineMismatch,
    EngineNotFound,
    ModelError,
    OutOfMemory,
    StoreError,
    WorkerError,
)
from helpers.machine import hardware
from helpers.maintain import notebooks
from helpers.paths import engines_folder

RECIPE = BuildRecipe(**limits())
ROOT = Path(__file__).parents[2]  # for test_shared_store.py
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class FakeBackend:
    """Builds in no time; `work` says what happens in the middle."""

    def __init__(self, work=lambda folder: None, size=1000):
        self.work, self.size, self.builds = work, size, 0

    def identity(self, recipe, checkpoint):
        machine = hardware.describe(recipe.device)
        return {
            "recipe": {"device": machine.device, "decode_batch_sizes": list(recipe.all_decode_batch_sizes)},
            "architecture": machine.architecture,
            "versions": hardware.versions(),
        }

    def check_machine(self, name, identity):
        pass

    def load(self, recipe, folder, manifest):
        return (folder / "graph.pt2").read_bytes()

    def estimate(self, recipe, config, device):
        return 1.0, self.size, 1.2 * self.size

    def build(self, recipe, checkpoint, folder, progress):
        self.builds += 1
        with progress.phase("compile"):
            (folder / "graph.pt2").write_bytes(b"half")
            self.work(folder)
            (folder / "graph.pt2").write_bytes(b"whole")
        write_report(EngineReport("aot", [], []), folder)
        return {"note": "fake"}


@pytest.fixture
def engines(tmp_path, monkeypatch) -> Path:
    """An empty engines folder of this test's own."""
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path / "engines"))
    return engines_folder()


@pytest.fixture
def fake(engines, monkeypatch):
    def use(*arguments, **settings):
        backend = FakeBackend(*arguments, **settings)
        monkeypatch.setattr(backends, "module", lambda name: backend)
        return backend

    return use


def leftovers(engines: Path) -> list[str]:
    """What lies in a folder of engines, beside lock files."""
    names = [p.name for p in engines.iterdir() if p.name != ".locks"]
    return sorted(names + [p.name for p in (engines / ".locks").glob("*") if p.suffix != ".lock"])


# ---- published whole or not at all ------------------------------------------------------------------------


class Unread:
    """A standard error that nobody reads any more, such as a pipe to a program that has ended."""

    def isatty(self):
        return True

    def write(self, text=""):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    flush = write


@pytest.mark.parametrize("stream", [Unread(), None, SimpleNamespace(write=len)], ids=["unread", "none", "a learner's"])
def test_a_build_does_not_depend_on_what_it_prints(fake, monkeypatch, stream):
    backend = fake()
    monkeypatch.setattr("sys.stderr", stream)
    folder = build(RECIPE)
    assert build(RECIPE) == build(RECIPE, quiet=True) == folder and backend.builds == 1


def test_an_engine_of_a_model_behind_a_link_is_found_by_the_recipe_that_built_it(fake, tmp_path, monkeypatch):
    from helpers.model.checkpoint import BUNDLED

    fake()
    (tmp_path / "link").symlink_to(BUNDLED)
    monkeypatch.chdir(BUNDLED)
    folders = [build(RECIPE.replace(model=m), quiet=True) for m in (str(tmp_path / "link"), ".", str(BUNDLED))]
    assert len(set(folders)) == 1 and locate(recipe_of(folders[0])) == locate(RECIPE.replace(model=".")) == folders[0]


def test_verify_reads_the_engines_behind_those_of_the_same_name(fake, tmp_path, monkeypatch, capsys):
    """A damaged one in a shared store is built again in one's own, and others still meet it."""
    fake()
    folder = build(RECIPE, quiet=True)
    shutil.copytree(folder, tmp_path / "shared" / folder.name)
    file = next(path for path in (tmp_path / "shared" / folder.name).iterdir() if path.name != store.MANIFEST)
    file.write_bytes(b"damaged")
    monkeypatch.setenv("COURSE_ENGINES", f"{folder.parent}{os.pathsep}{tmp_path / 'shared'}")
    assert store.list_engines() == [folder] and cli.main(["verify"]) == 1
    told = capsys.readouterr().out
    assert f"whole    {folder.name}\n" in told and "damaged  " in told


def test_what_a_build_reads_before_it_begins_is_shown_where_it_takes_long(fake, monkeypatch, capsys):
    """The first time in a process, transformers is imported for it."""
    backend = fake()
    backend.estimate = lambda *_: time.sleep(0.3) or (1.0, 1000, 0.0)
    monkeypatch.setattr("helpers.progress.SILENT_S", 0.1)
    name = build(RECIPE).name
    assert f"Reading what {name} is built from" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name on this system")
@pytest.mark.timeout(60)
def test_a_pipe_in_a_manifests_place_is_not_waited_for(fake):
    backend = fake()
    folder = build(RECIPE, quiet=True)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(EngineNotFound):
        load(folder)
    assert build(RECIPE, quiet=True) == folder and backend.builds == 2


def test_what_no_memory_holds_is_not_read(fake, tmp_path, capsys):
    """A manifest of a terabyte, and a device without an end in the place of a recipe, a record and a notebook."""
    fake()
    folder = build(RECIPE, quiet=True)
    os.truncate(folder / "manifest.json", 10**12)
    with pytest.raises(EngineCorrupt, match="1000000 MB"):
        load(folder)
    assert cli.main(["list"]) == 0 and "damaged" in capsys.readouterr().out
    assert whole(build(RECIPE, quiet=True))
    for read in (recipes.read, records.read, notebooks.read):
        with pytest.raises(CourseError):
            read(Path("/dev/zero"))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_a_sound_engine_that_cannot_be_read_now_is_neither_corrupt_nor_built_again(fake, monkeypatch, number):
    backend = fake()
    folder = build(RECIPE, quiet=True)
    for called in ("read_text", "open"):
        with monkeypatch.context() as patch:
            plain = getattr(Path, called)

            def refuse(path, *arguments, plain=plain, **settings):
                if path.is_relative_to(folder):
                    raise OSError(number, os.strerror(number), str(path))
                return plain(path, *arguments, **settings)

            patch.setattr(Path, called, refuse)
            for call in (load, inspect, lambda _: build(RECIPE, quiet=True)):
                with pytest.raises(StoreError, match=os.strerror(number)):
                    call(folder)
    assert backend.builds == 1 and load(folder) == b"whole"


CAUSES = {errno.EMFILE: "ulimit", errno.EROFS: "read-only", errno.EIO: "disk", errno.EACCES: "another user"}


@pytest.mark.parametrize("number", CAUSES)
def test_what_the_system_refuses_has_its_own_cause(fake, engines, monkeypatch, number):
    """A store that cannot be listed; and the report of an engine, which is not damaged for that."""
    fake()
    folder = build(RECIPE, quiet=True)
    calls = {"iterdir": (engines, store.list_engines), "read_text": (folder / "report.json", lambda: inspect(folder))}
    for called, (refused, call) in calls.items():
        plain = getattr(Path, called)

        def refuse(path, *arguments, plain=plain, refused=refused, **settings):
            if path == refused:
                raise OSError(number, os.strerror(number), str(path))
            return plain(path, *arguments, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(Path, called, refuse)
            with pytest.raises(StoreError) as told:
                call()
        assert CAUSES[number] in told.value.cause or "may not read" in told.value.what
        assert "user" not in told.value.cause or number == errno.EACCES


def test_a_build_publishes_files_and_a_manifest_that_describes_them(fake, engines):
    fake()
    folder = build(RECIPE, quiet=True)
    assert leftovers(engines) == [folder.name]
    manifest = whole(folder)
    assert manifest["files"].keys() == {p.name for p in folder.iterdir()} - {"manifest.json"}
    assert manifest["files"]["graph.pt2"]["bytes"] == 5
    assert manifest["identity"]["versions"]["torch"] and manifest["identity"]["architecture"]
    assert len(manifest["identity"]["checkpoint"]) == len(manifest["identity"]["tokenizer"]) == 64
    assert manifest["compiler"] and manifest["hardware"]["name"]
    assert manifest["seconds"].keys() >= {"compile"}
    assert manifest["details"] == {"note": "fake"}


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("broken"), RuntimeError),
        (SystemExit(1), SystemExit),
        (MemoryError(), OutOfMemory),
        (OSError(errno.EMFILE, "Too many open files"), BuildError),
        (RuntimeError("can't start new thread"), BuildError),
    ],
    ids=repr,
)
def test_an_interrupted_build_leaves_nothing_and_the_next_one_works(fake, engines, failure, told):
    def fail(folder):
        raise failure

    fake(fail)
    with pytest.raises(told):
        build(RECIPE, quiet=True)
    assert leftovers(engines) == []
    fake()
    assert whole(build(RECIPE, quiet=True))


def fork(work, *arguments):
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def build_until_told(side: Path) -> None:
    """In a fork: a build that writes the file "started" and waits for the file "go"."""

    def work(folder):
        (side / "started").write_text("x")
        while not (side / "go").exists():
            time.sleep(0.02)

    backends.module = lambda name: FakeBackend(work)
    build(RECIPE, quiet=True)


@pytest.fixture
def other_build(engines, tmp_path):
    """A build of RECIPE that goes on in another process until `go` is called."""
    if os.name == "nt":
        pytest.skip("needs fork")
    hardware.describe("cpu")  # once, before the fork
    process = fork(build_until_told, tmp_path)
    process.go = (tmp_path / "go").touch
    wait_for(tmp_path / "started")
    yield process
    process.kill()
    process.join()


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists() and path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path.name} did not appear")


@FORKS
def test_another_build_leaves_one_that_is_going_on_alone(other_build, fake):
    fake()
    build(RECIPE.replace(precision="bf16"), quiet=True)
    other_build.go()
    other_build.join(60)
    assert other_build.exitcode == 0 and len(store.list_engines()) == 2


@FORKS
def test_a_build_whose_lock_is_deleted_is_left_alone(other_build, fake, engines):
    """Somebody deletes .locks because a build hangs, or to tidy up."""
    backend = fake()
    shutil.rmtree(engines / ".locks")
    build(RECIPE.replace(precision="bf16"), quiet=True)
    for _ in range(2):
        with pytest.raises(StoreError, match="lock was deleted") as told:
            build(RECIPE, quiet=True)
        assert ".building-" in told.value.fix
    other_build.go()
    other_build.join(60)
    assert other_build.exitcode == 0 and whole(build(RECIPE, quiet=True)) and backend.builds == 1
    assert leftovers(engines) == sorted(folder.name for folder in store.list_engines())


def test_two_threads_build_side_by_side(fake, engines):
    both = threading.Barrier(2, timeout=60)
    fake(lambda folder: both.wait())
    threads = [
        threading.Thread(target=build, args=(RECIPE.replace(precision=p),), kwargs={"quiet": True})
        for p in ("fp32", "bf16")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.list_engines()) == 2 and all(whole(p) for p in store.list_engines())


def test_force_builds_again_and_a_failing_one_keeps_the_old_engine(fake, engines):
    backend = fake()
    folder = build(RECIPE, quiet=True)
    assert build(RECIPE, quiet=True, force=True) == folder and backend.builds == 2
    backend.work = lambda folder: 1 / 0
    with pytest.raises(ZeroDivisionError):
        build(RECIPE, quiet=True, force=True)
    assert whole(folder) and leftovers(engines) == [folder.name]


@FORKS
def test_a_second_build_of_the_same_engine_says_what_it_waits_for(other_build, fake, capsys):
    backend = fake()
    import transformers  # noqa: F401  (it takes seconds; the build shall be waiting before the other one ends)

    threading.Timer(1.5, other_build.go).start()  # after a second it is told
    folder = build(RECIPE)
    told = capsys.readouterr().err
    assert f"Another process builds {folder.name}" in told and "wait" in told and "Cache hit" in told
    assert backend.builds == 0


@FORKS
def test_waiting_for_another_build_can_be_interrupted(other_build, fake):
    backend = fake()
    timer = threading.Timer(1.5, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        build(RECIPE, quiet=True)
    assert backend.builds == 0 and other_build.is_alive()


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("null"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "graph.pt2").write_bytes(b"WHOLE"),
        lambda folder: (folder / "graph.pt2").unlink(),
    ],
    ids=["cut manifest", "no manifest", "torn", "changed file", "missing file"],
)
def test_what_build_returns_is_whole_whatever_it_prints(fake, engines, quiet, damage, capsys):
    backend = fake()
    folder = build(RECIPE, quiet=True)
    damage(folder)
    assert whole(build(RECIPE.replace(precision="bf16"), quiet=True))  # it keeps no other from being built
    assert build(RECIPE, quiet=quiet) == folder and whole(folder) and backend.builds == 3
    assert ("Building" in capsys.readouterr().err) is not quiet


# ---- what else may lie in the folder ----------------------------------------------------------------------


def test_what_is_not_ours_stays(fake, engines):
    fake()
    foreign = [".removed-123-456789", ".building-site", ".building-stories-aot-fp32-b4-12345678"]
    for name in foreign:
        (engines / name).mkdir()
    folder = build(RECIPE, quiet=True)
    assert leftovers(engines) == sorted([folder.name, *foreign])


def test_files_and_links_in_the_way_of_a_build_give_way(fake, engines, tmp_path):
    fake()
    folder = build(RECIPE, quiet=True)
    store.remove(folder)
    (engines / f".building-{folder.name}").write_text("a file")
    (engines / f"{digests.MEMORY}x1y2z3").write_text("{")  # of a process that was killed while it wrote
    for doctor in ("doctor-x1y2z3", "doctor-at-work"):  # and of a doctor; another one looks at the locks just now
        (engines / ".locks" / doctor).mkdir()
    os.utime(engines / ".locks" / "doctor-x1y2z3", (0, 0))
    folder.write_text("a file, too")
    assert whole(build(RECIPE, quiet=True))
    outside = folder.replace(tmp_path / "outside")
    folder.symlink_to(outside, target_is_directory=True)
    (engines / f".building-{folder.name}").symlink_to(tmp_path, target_is_directory=True)
    assert build(RECIPE, quiet=True) == folder and whole(folder)  # an engine on another disk serves as well
    assert build(RECIPE, quiet=True, force=True) == folder and not folder.is_symlink() and whole(outside)
    assert leftovers(engines) == ["doctor-at-work", folder.name]


def test_removing_a_link_leaves_what_it_points_to(fake, engines, tmp_path):
    fake()
    folder = build(RECIPE, quiet=True)
    outside = folder.replace(tmp_path / "outside")
    folder.symlink_to(outside, target_is_directory=True)
    assert store.remove(folder.name) == folder
    assert leftovers(engines) == [] and whole(outside)


def test_the_folder_of_engines_may_start_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COURSE_ENGINES", "~/mine")
    monkeypatch.chdir(tmp_path)
    assert engines_folder() == tmp_path / "mine" and not (tmp_path / "~").exists()


def test_a_folder_of_engines_that_is_none_is_told(monkeypatch, tmp_path, fake):
    fake()
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "~nobody-of-that-name/x"):
        monkeypatch.setenv("COURSE_ENGINES", str(place))
        for call in (store.list_engines, lambda: build(RECIPE), lambda: load("x"), lambda: store.remove("x")):
            with pytest.raises(StoreError, match="folder of engines|path .* cannot be") as refused:
                call()
            assert "COURSE_ENGINES" in refused.value.fix


def test_a_folder_of_engines_that_cannot_be_written_is_told(fake, engines, monkeypatch):
    fake()
    folder = build(RECIPE, quiet=True)
    make = Path.mkdir

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", lambda path, *a, **k: make(path, *a, **k) if path.exists() else refuse(path))
    monkeypatch.setattr(Path, "replace", refuse)
    for call in (lambda: build(RECIPE, quiet=True, force=True), lambda: store.remove(folder)):
        with pytest.raises(StoreError, match="Read-only") as refused:
            call()
        assert "COURSE_ENGINES" in refused.value.fix
    assert whole(folder) and load(RECIPE) == b"whole"  # reading needs no writing


def test_another_persons_engines_are_left_alone(fake, engines, monkeypatch, capsys):
    fake()
    mine, other = (build(RECIPE.replace(precision=p), quiet=True) for p in ("fp32", "bf16"))

    def refusing(plain):
        def refuse(path, *arguments, **settings):
            if path.parent == other:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return plain(path, *arguments, **settings)

        return refuse

    for called in ("read_text", "stat"):  # its files are closed, then its folder too
        monkeypatch.setattr(Path, called, refusing(getattr(Path, called)))
        for given in (other, other.name, RECIPE.replace(precision="bf16")):
            with pytest.raises(StoreError, match="may not read"):
                load(given)
    assert cli.main(["list"]) == 0 and mine.name in capsys.readouterr().out
    assert build(RECIPE.replace(max_batch_size=2), quiet=True)


def test_an_engine_that_is_built_again_while_it_is_read_is_not_told_as_damaged(fake, engines):
    backend = fake()

    def read(recipe, folder, manifest):
        build(RECIPE, quiet=True, force=True)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "graph.pt2")

    backend.load = read
    with pytest.raises(EngineNotFound, match="built again while it was read"):
        load(build(RECIPE, quiet=True))


def test_readers_beside_a_process_that_builds_and_removes_get_an_engine_or_our_word(fake, engines):
    fake()
    stop, raw = time.monotonic() + 3, []

    def read():
        while time.monotonic() < stop:
            for call in (lambda: load(RECIPE), lambda: inspect(RECIPE), lambda: load("stories"), store.list_engines):
                try:
                    call()
                    [store.size(folder) for folder in store.list_engines()]
                except (EngineNotFound, EngineCorrupt):
                    pass
                except BaseException as error:
                    raw.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in readers:
        thread.start()
    for precision in itertools.cycle(("fp32", "bf16")):
        if time.monotonic() > stop:
            break
        store.remove(build(RECIPE.replace(precision=precision), quiet=True))
    for thread in readers:
        thread.join()
    assert raw == []


# ---- a full disk, no compiler -----------------------------------------------------------------------------


def test_too_little_disk_is_refused_before_the_build(fake, engines, monkeypatch):
    backend = fake(size=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1, used=1, free=10**9))
    with pytest.raises(BuildError, match="1000 MB free; this build needs about 2250 MB") as refused:
        build(RECIPE, quiet=True)
    assert backend.builds == 0 and refused.value.fix


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        WorkerError("SafetensorError in the worker: I/O error: Disk quota exceeded (os error 122)"),
        WorkerError("SafetensorError in the worker: I/O error: File too large (os error 27)"),
    ],
    ids=["from Python", "quota", "file size limit", "from safetensors", "quota in a worker", "size limit in a worker"],
)
def test_a_disk_that_fills_up_during_the_build_is_said_plainly(fake, engines, error):
    def fill(folder):
        raise error

    fake(fill)
    with pytest.raises(BuildError, match="disk is full"):
        build(RECIPE, quiet=True)
    assert leftovers(engines) == []


def test_a_temporary_folder_that_is_full_is_the_one_that_is_named(fake, engines, tmp_path):
    def fill(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    fake(fill)
    with pytest.raises(BuildError, match="disk is full") as told:
        build(RECIPE, quiet=True)
    assert f"left in {tmp_path}:" in told.value.cause and "TMPDIR" in told.value.fix


def test_without_a_cpp_compiler_nothing_is_built(engines, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler") as refused:
        build(RECIPE, quiet=True)
    assert "g++" in refused.value.fix and leftovers(engines) == []


def test_without_a_cpp_compiler_an_engine_still_loads(tiny_engine, tiny_llama, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    recipe = BuildRecipe(model=str(tiny_llama), **limits(max_batch_size=1, max_input_len=16, max_seq_len=48))
    with load(recipe) as engine:
        assert engine.generate([5, 6], SamplingParams(max_tokens=4))


# ---- found again, or explained ----------------------------------------------------------------------------


def test_a_second_build_is_a_hit_that_says_so(fake, engines, capsys):
    backend = fake()
    folder = build(RECIPE)
    assert "No aot engine has been built yet" in capsys.readouterr().err
    assert build(RECIPE) == folder and backend.builds == 1
    assert f"Cache hit: {folder.name}" in capsys.readouterr().err


def test_equal_recipes_are_one_engine_however_they_are_written(fake, engines, tmp_path, monkeypatch):
    from helpers.model.checkpoint import BUNDLED

    backend = fake()
    folder = build(RECIPE, quiet=True)
    for same in ({"decode_batch_sizes": [4, 1]}, {"device": "cpu"}, {"fusion": {"qkv": True}}):
        assert build(RECIPE.replace(**same), quiet=True) == folder
    monkeypatch.chdir(BUNDLED.parents[1])  # where a folder "stories" lies, which is not the model of that name
    assert build(RECIPE, quiet=True) == folder
    assert backend.builds == 1
    copies = [shutil.copytree(BUNDLED, tmp_path / place / "mine") for place in ("here", "there")]
    first, second = (build(RECIPE.replace(model=str(copy)), quiet=True) for copy in copies)
    assert first == second != folder and backend.builds == 2  # the content counts, not where it lies


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": "bf16"}, "precision: fp32 -> bf16"),
        ({"max_seq_len": 128}, "max_seq_len: 256 -> 128"),
        ({"max_batch_size": 2}, "max_batch_size: 4 -> 2"),
        ({"optimization_level": 0}, "optimization_level: 3 -> 0"),
        ({"fusion": {"gate_up": False}}, "fusion.gate_up: True -> False"),
        ({"num_threads": 2}, "num_threads: 0 -> 2"),
    ],
)
def test_a_miss_names_the_field_that_differs_from_the_nearest_engine(fake, engines, capsys, change, words):
    fake()
    nearest = build(RECIPE, quiet=True)
    build(RECIPE.replace(optimization_level=1, max_input_len=32, max_seq_len=200), quiet=True)  # farther away
    assert build(RECIPE.replace(**change)) != nearest
    said = capsys.readouterr().err
    assert nearest.name in said and words in said


def test_a_change_of_weights_tokenizer_or_torch_is_a_miss_that_says_so(fake, engines, tmp_path, capsys, monkeypatch):
    from helpers.model.checkpoint import BUNDLED

    fake()
    model = shutil.copytree(BUNDLED, tmp_path / "mine")
    recipe = RECIPE.replace(model=str(model))
    build(recipe, quiet=True)
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    build(recipe)
    assert "differs in tokenizer:" in capsys.readouterr().err
    config = model / "config.json"
    config.write_text(config.read_text() + " ")
    build(recipe)
    assert "differs in checkpoint:" in capsys.readouterr().err
    monkeypatch.setattr(hardware, "versions", lambda: {"torch": "1.0"})
    build(recipe)
    assert "versions.torch:" in capsys.readouterr().err


def test_a_name_or_its_start_finds_one_engine(fake, engines):
    fake()
    fp32, bf16 = (build(RECIPE.replace(precision=p), quiet=True) for p in ("fp32", "bf16"))
    assert locate(fp32.name) == locate(str(fp32)) == locate(fp32) == locate(RECIPE) == fp32
    assert locate("stories-aot-b") == bf16
    with pytest.raises(EngineNotFound, match="Several engines begin with 'stories'") as refused:
        locate("stories")
    assert fp32.name in refused.value.fix and bf16.name in refused.value.fix
    shutil.copytree(fp32, fp32.with_name(fp32.name + "-copy"))
    assert locate(fp32.name) == fp32  # a whole name wins over a start


def test_a_start_of_a_name_does_not_end_inside_a_number(fake, engines):
    """`helpers remove stories-aot-fp32-b1` had deleted the engine for 16."""
    fake()
    sixteen = build(RECIPE.replace(max_batch_size=16), quiet=True)
    with pytest.raises(EngineNotFound):
        store.remove("stories-aot-fp32-b1")
    assert locate("stories-aot-fp32-b16") == locate("stories-aot-fp32-b16-") == sixteen
    one = build(RECIPE.replace(max_batch_size=1), quiet=True)
    assert locate("stories-aot-fp32-b1") == one
    for name in ("layer16-tensorrt-fp32-e4a21b00", "checkpoint-5000-aot-fp32-b1-2e564b7f"):  # one's own numbers too
        shutil.copytree(one, one.with_name(name))
    for start in ("layer1", "checkpoint-500"):
        with pytest.raises(EngineNotFound):
            store.remove(start)
    assert locate("layer16").name.startswith("layer16-") and locate("checkpoint-5000-aot-fp32-b1-2e5")
    assert locate("layer16-tensorrt-fp32-e4a2").name.endswith("1b00")  # a hash may be cut anywhere


def test_a_path_names_the_engine_of_that_store_alone(fake, engines, tmp_path, monkeypatch):
    """`helpers remove` had deleted the learner's own engine, given the path of a shared one that was gone."""
    fake()
    own = build(RECIPE, quiet=True)
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("COURSE_ENGINES", os.pathsep.join([str(own.parent), str(shared)]))
    with pytest.raises(EngineNotFound):
        store.remove(str(shared / own.name))
    assert locate(own.parent / own.name[:-2]) == locate(own.name) == own


@pytest.mark.parametrize("name", ["nothing", "", "/", ".", "..", "elsewhere/stories", ".locks"])
def test_no_engine_is_found_by_a_name_that_is_none(fake, engines, name):
    fake()
    built = build(RECIPE, quiet=True)
    with pytest.raises(EngineNotFound) as refused:
        store.remove(name)
    assert built.name in refused.value.fix and built.exists()


def test_a_loaded_engine_is_not_called_one_that_was_never_built(engines):
    for use in (locate, inspect, recipe_of, load, load_plan, store.remove):
        with pytest.raises(EngineNotFound) as refused:
            use(Scripted([5]))
        assert "engine.recipe" in refused.value.fix and "not been built" not in refused.value.cause


def test_removing_deletes_one_engine_and_only_within_the_engines_folder(fake, engines, tmp_path):
    fake()
    fp32, bf16 = (build(RECIPE.replace(precision=p), quiet=True) for p in ("fp32", "bf16"))
    outside = shutil.copytree(fp32, tmp_path / "outside")
    with pytest.raises(EngineNotFound, match="left alone"):
        store.remove(outside)
    assert store.remove(fp32.name) == fp32
    assert leftovers(engines) == [bf16.name] and outside.exists()
    with pytest.raises(EngineNotFound, match="precision: bf16 -> fp32|No engine has been built"):
        load(RECIPE)


# ---- never loaded when damaged, or from elsewhere ---------------------------------------------------------


def edit_manifest(folder: Path, change) -> Path:
    """As a build that meant it would have written it: with the right hash, and under the right name."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    store.save_manifest(folder, manifest)
    return folder.rename(folder.with_name(store.name_of(folder.name.rpartition("-")[0], manifest["identity"])))


@pytest.mark.parametrize("name", ["decode_b1.pt2", "weights.safetensors", "tokenizer.json", "report.json"])
def test_a_damaged_file_is_refused_by_name(own_engines, name):
    """test_promises.py tries every kind of damage."""
    (own_engines / name).write_bytes(b"")
    with pytest.raises(EngineCorrupt, match=name) as refused:
        load(own_engines.name)
    assert f"remove {own_engines.name}" in refused.value.fix
    if name == "report.json":
        with pytest.raises(EngineCorrupt, match=name):
            inspect(own_engines)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"identity": 1}', '{"identity": {"schema": 1}}'])
def test_a_manifest_that_is_none_is_refused(own_engines, content):
    (own_engines / "manifest.json").write_text(content)
    with pytest.raises(EngineCorrupt, match="manifest"):
        load(own_engines)
    store.remove(own_engines.name)
    assert store.list_engines() == []


@pytest.mark.parametrize("name", ["../outside", "/tmp/x", "a/../../x", "..", "C:\\x", "a\\b", "a//b"])
def test_a_manifest_that_names_a_file_outside_is_refused(fake, engines, name):
    fake()
    folder = build(RECIPE, quiet=True)
    folder = edit_manifest(folder, lambda m: m["files"].update({name: m["files"]["graph.pt2"]}))
    with pytest.raises(EngineCorrupt, match="outside"):
        load(folder)


def test_a_file_that_no_build_wrote_is_refused(fake, engines, tmp_path):
    fake()
    folder = build(RECIPE, quiet=True)
    (tmp_path / "file").write_text("x")
    for name, make in {
        "more.safetensors": lambda path: path.write_bytes(b"other weights"),
        "below/graph.pt2": lambda path: (path.parent.mkdir(), path.write_text("x")),
        "link": lambda path: path.symlink_to(tmp_path / "file"),
        "linked folder": lambda path: path.symlink_to(tmp_path, target_is_directory=True),
    }.items():
        make(folder / name)
        with pytest.raises(EngineCorrupt, match=name) as refused:
            load(folder)
        assert "Delete" in refused.value.fix
        (folder / name).unlink()
    assert load(folder) == b"whole"


def test_a_file_that_is_only_a_link_is_refused(fake, engines, tmp_path):
    fake()
    folder = build(RECIPE, quiet=True)
    (folder / "graph.pt2").replace(tmp_path / "graph.pt2")
    (folder / "graph.pt2").symlink_to(tmp_path / "graph.pt2")
    with pytest.raises(EngineCorrupt, match="graph.pt2 is only a link"):
        load(folder)


def test_an_engine_under_anothers_name_is_refused(fake, engines):
    fake()
    fp32, bf16 = (build(RECIPE.replace(precision=p), quiet=True) for p in ("fp32", "bf16"))
    store.remove(bf16)
    shutil.copytree(fp32, bf16)
    with pytest.raises(EngineCorrupt, match="its name is not that of the engine"):
        load(bf16)
    assert load(fp32) == b"whole"


def test_a_renamed_engine_is_told_as_that_and_serves_under_a_name_with_its_end(fake, engines):
    fake()
    folder = build(RECIPE, quiet=True)
    mine = folder.rename(folder.with_name("my-first-engine"))
    with pytest.raises(EngineCorrupt) as refused:
        load(mine)
    assert "renamed" in refused.value.cause
    name = refused.value.fix.partition("call it ")[2].partition(",")[0]
    mine.rename(mine.with_name(name))
    assert load(name) == b"whole"


def test_a_large_file_that_changes_by_itself_is_found_on_request(fake, engines, monkeypatch):
    """As on a failing disk, where size and times stay. test_digests.py has what is noticed by these."""
    monkeypatch.setattr(digests, "LARGE", 1)
    monkeypatch.setattr(digests, "SETTLED_S", -1.0)
    monkeypatch.setattr(digests, "_stamp", lambda path: [5, 1, 1, 1])
    fake()
    folder = build(RECIPE, quiet=True)
    manifest = whole(folder)  # reads, and remembers
    (folder / "graph.pt2").write_bytes(b"WHOLE")  # of the same size
    store.verify(folder, manifest)
    with pytest.raises(EngineCorrupt, match="graph.pt2"):
        store.verify(folder, manifest, thorough=True)


def test_an_engine_that_cannot_be_read_keeps_no_other_from_being_verified(fake, monkeypatch, capsys):
    fake()
    first, second = (build(RECIPE.replace(precision=precision), quiet=True) for precision in ("fp32", "bf16"))
    (second / "graph.pt2").write_bytes(b"WHOLE")
    plain = store.verify

    def refuse(folder, *arguments, **settings):
        if folder == first:
            raise StoreError("You may not read it.")
        plain(folder, *arguments, **settings)

    monkeypatch.setattr(store, "verify", refuse)
    assert cli.main(["verify"]) == 1
    shown = capsys.readouterr().out
    assert "not read You may not" in shown and f"damaged  Engine {second.name!r}" in shown


# ---- the recipe of an engine ------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["./stories", "stories/", "../{0}/stories", "{1}/stories"])
def test_a_folder_named_like_the_bundled_model_stays_that_folder(fake, engines, tmp_path, monkeypatch, written):
    from helpers.model.checkpoint import BUNDLED

    fake()
    own = shutil.copytree(BUNDLED, tmp_path / "stories")
    (own / "config.json").write_text((own / "config.json").read_text() + " ")  # so that it is not the bundled one
    monkeypatch.chdir(tmp_path)
    folder = build(RECIPE.replace(model=written.format(tmp_path.name, tmp_path)), quiet=True)
    assert folder != build(RECIPE, quiet=True)
    monkeypatch.chdir("/")  # wherever it is asked
    assert recipe_of(folder) == RECIPE.replace(model=str(own))
    assert recipe_of(build(RECIPE, quiet=True)) == RECIPE
    assert locate(recipe_of(folder)) == folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_the_recipe_of_an_engine_whose_checkpoint_is_gone_or_changed(fake, engines, tmp_path, name):
    from helpers.model.checkpoint import BUNDLED

    fake()
    own = shutil.copytree(BUNDLED, tmp_path / "own")
    folder = build(RECIPE.replace(model=str(own)), quiet=True)
    assert recipe_of(folder).model == str(own)
    (own / name).write_text((own / name).read_text() + " ")
    with pytest.raises(ModelError, match="not the one that engine"):
        recipe_of(folder)
    shutil.rmtree(own)
    with pytest.raises(ModelError, match="own"):
        recipe_of(folder)
    assert load(folder) == b"whole"  # the engine needs it no longer


def test_a_manifest_gives_its_recipe_back(tiny_engine, tiny_llama):
    recipe = recipe_of(tiny_engine)
    assert recipe.device == "cpu" and recipe.max_seq_len == 48
    assert Path(recipe.model).name == tiny_llama.name  # an equal checkpoint: another test process may have built it


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_checkpoint_that_changes_while_an_engine_is_built_from_it_publishes_nothing(fake, engines, tmp_path, name):
    from helpers.model.checkpoint import BUNDLED

    own = shutil.copytree(BUNDLED, tmp_path / "own")

    def save_anew(folder):
        (own / name).write_text((own / name).read_text() + " ")

    fake(save_anew)
    with pytest.raises(BuildError, match="changed while"):
        build(RECIPE.replace(model=str(own)), quiet=True)
    assert leftovers(engines) == []


def test_a_report_that_no_build_wrote_is_not_read(fake):
    fake()
    folder = build(RECIPE, quiet=True)
    manifest = store.read_manifest(folder)
    del manifest["files"]["report.json"]
    store.save_manifest(folder, manifest)
    with pytest.raises(EngineCorrupt, match="does not list report.json"):
        inspect(folder)


def test_a_tensorrt_plan_is_not_looked_for_in_another_backends_engine(fake, engines):
    fake()
    folder = build(RECIPE, quiet=True)
    with pytest.raises(EngineMismatch, match="no plan of the TensorRT builder") as refused:
        load_plan(folder)
    assert "'aot'" in refused.value.cause


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m: m.update(schema=99), EngineCorrupt, "schema 99"),
        (lambda m: m["identity"].update(architecture="aarch64 SVE"), EngineMismatch, "architecture aarch64 SVE"),
        (lambda m: m["identity"]["versions"].update(torch="1.0"), EngineMismatch, r"torch 1\.0"),
        (lambda m: m["identity"]["versions"].update(cuda="99.9"), EngineMismatch, r"cuda 99\.9"),
        (lambda m: m["identity"].update(instructions="avx2 avx9000"), EngineMismatch, "avx9000"),
    ],
    ids=["schema", "architecture", "torch", "cuda", "instructions"],
)
def test_an_engine_from_another_machine_or_version_is_refused(own_engines, change, error, words):
    folder = edit_manifest(own_engines, change)
    with pytest.raises(error, match=words) as refused:
        load(folder)
    assert refused.value.cause and refused.value.fix


def test_an_engine_for_a_gpu_is_refused_without_one(own_engines):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    folder = edit_manifest(own_engines, lambda m: m["identity"]["recipe"].update(device="cuda"))
    with pytest.raises(BackendUnavailable, match="no NVIDIA GPU"):
        load(folder)


@pytest.mark.parametrize("backend", ["pytorch", "torch_compile"])
def test_a_backend_that_compiles_nothing_ahead_has_nothing_to_build(engines, backend):
    with pytest.raises(BuildError, match="nothing to build") as refused:
        build(RECIPE.replace(backend=backend))
    assert "load(recipe)" in refused.value.fix


def test_what_to_do_about_a_damaged_engine_depends_on_where_it_lies(tmp_path, monkeypatch):
    """`helpers remove NAME` of a copy elsewhere would remove the sound engine of that name, and leave the copy."""
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv("COURSE_ENGINES", os.pathsep.join([str(tmp_path / "engines"), str(tmp_path / "shared")]))
    assert "helpers remove x-aot-1" in store.how_to_replace(tmp_path / "engines" / "x-aot-1")
    for place, words in (("shared", "your own store"), ("copies", f"Delete {tmp_path / 'copies' / 'x-aot-1'}")):
        fix = store.how_to_replace(tmp_path / place / "x-aot-1")
        assert words in fix and "helpers remove" not in fix


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("libtorch_cpu.so: failed to map segment from shared object", OutOfMemory),
        ("cannot import name 'Tokenizer' from 'tokenizers' (tokenizers.py)", BackendUnavailable),
    ],
)
def test_a_backend_that_cannot_be_imported_says_whether_memory_was_the_reason(monkeypatch, words, kind):
    def refuse(name):
        raise ImportError(words)

    monkeypatch.setattr("importlib.import_module", refuse)
    with pytest.raises(kind, match=words[:15]):
        backends.module("pytorch")
