"""Stores that several people use: what is read and written where, with which modes, and whose engines are loaded."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_store import RECIPE, ROOT, engines, fake, leftovers, wait_for  # noqa: F401  (fixtures)

from helpers import access, build, cli, inspect, load, progress, store
from helpers.bench.run import _turn
from helpers.engine import locate
from helpers.errors import EngineCorrupt, EngineNotFound, StoreError
from helpers.machine import doctor

ANNA, BERT = 12345, 65534  # users of this machine as far as it cares; one has no name, the other is "nobody"
posix = pytest.mark.skipif(os.name != "posix", reason="modes and owners are read on POSIX systems only")
as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can play two users")


def everything(folder: Path) -> dict[str, tuple]:
    """What lies in a folder; each entry with what changes when it is written or its mode is set."""
    entries = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    return {str(path): (s.st_size, s.st_mode, s.st_mtime_ns, s.st_ctime_ns) for path, s in entries.items()}


# ---- several stores ---------------------------------------------------------------------------------------


@pytest.fixture
def stores(fake, tmp_path, monkeypatch):  # noqa: F811
    """(own, shared): the shared one holds an engine of RECIPE, and is named after the learner's own."""
    own, shared = tmp_path / "own", tmp_path / "shared"
    monkeypatch.setenv("COURSE_ENGINES", str(shared))
    fake()
    build(RECIPE, quiet=True)
    monkeypatch.setenv("COURSE_ENGINES", f"{own}{os.pathsep}{shared}{os.pathsep}")
    return own, shared


def test_an_engine_is_found_in_any_store_and_nothing_is_written_there(stores, fake, capsys):  # noqa: F811
    own, shared = stores
    before, backend = everything(shared), fake()
    folder = build(RECIPE)
    assert folder.parent == shared and f", in {shared} (" in capsys.readouterr().err
    assert locate(RECIPE) == store.find(folder.name) == folder and load(RECIPE) == load(folder.name) == b"whole"
    assert inspect(RECIPE) and backend.builds == 0
    other = build(RECIPE.replace(precision="bf16"), quiet=True)
    assert other.parent == own and [p.name for p in store.list_engines()] == [folder.name, other.name]
    assert everything(shared) == before


def test_the_learners_own_store_comes_first(stores, fake):  # noqa: F811
    own, shared = stores
    folder = build(RECIPE, quiet=True, force=True)
    assert folder.parent == own and load(RECIPE) == b"whole"
    assert locate(RECIPE) == store.find(folder.name) == build(RECIPE, quiet=True) == folder
    assert store.list_engines() == [folder]  # the shared one of that name is never used
    assert store.remove(folder.name) == folder and locate(RECIPE) == shared / folder.name


def test_only_the_learners_own_store_is_removed_from(stores):
    own, shared = stores
    for engine in (locate(RECIPE), locate(RECIPE).name):
        with pytest.raises(EngineNotFound, match="left alone") as refused:
            store.remove(engine)
        assert str(shared) in refused.value.what and str(own) in refused.value.what
    assert load(RECIPE) == b"whole"


def test_a_damaged_engine_of_a_shared_store_is_built_again_in_the_learners_own(stores, capsys):
    own, shared = stores
    (locate(RECIPE) / "graph.pt2").write_bytes(b"wh0le")
    with pytest.raises(EngineCorrupt) as refused:
        load(RECIPE)
    assert "helpers remove" not in refused.value.fix and str(shared) in refused.value.fix
    assert build(RECIPE).parent == own and "is built again" in capsys.readouterr().err
    assert load(RECIPE) == b"whole"


def test_the_list_says_where_each_engine_lies(stores, capsys):
    own, shared = stores
    build(RECIPE.replace(precision="bf16"), quiet=True)
    assert cli.main(["list"]) == 0
    places = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("stories")]
    assert sorted(places) == sorted([str(own), str(shared)])


def test_a_shared_store_that_is_not_there_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for other in (tmp_path / "missing", tmp_path / "file", "~nobody-of-that-name"):
        monkeypatch.setenv("COURSE_ENGINES", os.pathsep.join([str(tmp_path / "own"), str(other)]))
        with pytest.raises(StoreError, match="older? of engines|path .* cannot be") as refused:
            store.list_engines()
        assert "COURSE_ENGINES" in refused.value.fix and not (tmp_path / "missing").exists()


def test_the_doctor_names_all_stores(stores, monkeypatch):
    own, shared = stores
    check = doctor.check_engines()
    assert check.status != "failure" and str(own) in check.found and f"{shared} (writable)" in check.found
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert f"{shared} (read-only)" in doctor.check_engines().found


def test_two_benchmarks_of_one_user_take_turns_whatever_their_stores(tmp_path, monkeypatch):
    class Waiting(Exception):
        pass

    def refuse(title):
        assert "Another process runs a benchmark" in title
        raise Waiting

    monkeypatch.setattr(progress, "Progress", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with _turn():
        monkeypatch.setenv("COURSE_ENGINES", str(tmp_path / "other engines"))
        with pytest.raises(Waiting), _turn():
            pass
    with _turn():
        pass


# ---- modes ------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(
    ("umask", "folders", "files"),
    [(0o022, 0o755, 0o644), (0o002, 0o755, 0o644), (0o027, 0o750, 0o640), (0o077, 0o700, 0o600), (0o000, 0o755, 0o644)],
)
def test_what_is_published_can_be_read_as_the_umask_says(fake, engines, umask, folders, files):  # noqa: F811
    def private(folder):  # as safetensors and tempfile leave it
        (folder / "parts").mkdir(mode=0o700)
        for path in (folder / "weights.safetensors", folder / "parts" / "one"):
            path.touch(mode=0o600)

    fake(private)
    before = os.umask(umask)
    try:
        folder = build(RECIPE, quiet=True)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    assert modes == {path: folders if path.is_dir() else files for path in modes}
    assert len(modes) > 5 and load(RECIPE) == b"whole"


# ---- whose engines are loaded -----------------------------------------------------------------------------


@pytest.fixture
def engine(fake, engines, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """An engine that loads."""
    (tmp_path / "code").mkdir(mode=0o755)  # a checkout that anybody can write to would turn the check off
    monkeypatch.setattr(access, "PACKAGE", tmp_path / "code")
    fake()
    folder = build(RECIPE, quiet=True)
    access.check_trust(folder)
    return folder


@posix
@pytest.mark.parametrize(
    ("place", "mode"),
    [
        ("engine", 0o777),
        ("engine", 0o1777),  # sticky keeps what is there, and lets others add
        ("engine/graph.pt2", 0o646),
        ("engine/manifest.json", 0o666),
        ("store", 0o777),
        ("above", 0o757),
    ],
)
def test_an_engine_that_others_could_change_is_not_loaded_until_one_command_mends_that(engine, place, mode):
    places = {"engine": engine, "store": engine.parent, "above": engine.parent.parent}
    path = places.get(place) or engine / place.partition("/")[2]
    path.chmod(mode)
    for call in (lambda: load(RECIPE), lambda: load(engine), lambda: build(RECIPE, quiet=True)):
        with pytest.raises(StoreError, match="others may write") as refused:
            call()
        assert refused.value.cause and str(path) in refused.value.what
    assert inspect(engine)  # no native code is loaded for that
    subprocess.run(refused.value.fix, shell=True, check=True)
    assert load(RECIPE) == b"whole"


@posix
def test_a_sticky_store_and_a_trusted_one_may_be_open_to_others(engine, monkeypatch):
    engine.parent.chmod(0o1777)
    assert load(RECIPE) == b"whole"
    engine.parent.chmod(0o777)
    monkeypatch.setenv("COURSE_TRUSTED_ENGINES", f"/nowhere{os.pathsep}{engine.parent}")
    assert load(RECIPE) == b"whole"
    monkeypatch.setenv("COURSE_TRUSTED_ENGINES", str(engine.parent.parent))  # a store is named itself
    with pytest.raises(StoreError, match="others may write"):
        load(RECIPE)


@posix
def test_a_link_does_not_lead_around_the_rule(engine, tmp_path):
    elsewhere = tmp_path / "open to all"
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    engine.symlink_to(engine.replace(elsewhere / engine.name), target_is_directory=True)
    with pytest.raises(StoreError, match="open to all"):
        load(RECIPE)


@posix
def test_a_group_that_is_the_owners_alone_may_write(engine, monkeypatch):
    """As where each user has a group of the same name, and the umask is 002."""
    grp, pwd = pytest.importorskip("grp"), pytest.importorskip("pwd")
    me, group = pwd.getpwuid(os.geteuid()), SimpleNamespace(gr_name="a group", gr_mem=[])
    monkeypatch.setattr(grp, "getgrgid", lambda number: group)
    stranger = SimpleNamespace(pw_uid=ANNA, pw_gid=engine.parent.stat().st_gid, pw_name="anna")
    monkeypatch.setattr(pwd, "getpwnam", {me.pw_name: me, "anna": stranger}.__getitem__)
    engine.parent.chmod(0o775)

    def refused(users, name="a group", members=()):
        monkeypatch.setattr(pwd, "getpwall", lambda: users)
        group.gr_name, group.gr_mem = name, list(members)
        try:
            access.check_trust(engine)
        except StoreError:
            return True
        return False

    mine = SimpleNamespace(pw_uid=me.pw_uid, pw_gid=engine.parent.stat().st_gid, pw_name=me.pw_name)
    assert not refused([mine]) and not refused([mine], members=[me.pw_name])
    assert not refused([], me.pw_name)  # users of a network, who are not all listed
    assert refused([]) and refused([mine, stranger]) and refused([mine], me.pw_name, ["anna"])
    assert refused([mine], members=["gone"])


@posix
def test_where_anybody_can_change_the_courses_code_its_engines_are_no_worse(engine, tmp_path, monkeypatch):
    """So it is on a disk without modes, such as a Windows disk seen from Linux."""
    engine.chmod(0o777)
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers").chmod(0o777)
    monkeypatch.setattr(access, "PACKAGE", tmp_path / "helpers")
    assert load(RECIPE) == b"whole"


@as_root
def test_the_owner_is_you_or_root_or_who_owns_the_store_that_was_named(engine, tmp_path, monkeypatch):
    copy = tmp_path / "copies" / engine.name
    shutil.copytree(engine, copy)

    def owned_by(user, *paths):
        for path in paths:
            os.chown(path, user, -1)

    owned_by(ANNA, engine.parent, engine, *engine.iterdir())
    assert load(RECIPE) == b"whole"  # the store is Anna's, and it was named
    owned_by(BERT, engine / "graph.pt2")
    with pytest.raises(StoreError, match="another user"):
        load(RECIPE)
    owned_by(ANNA, copy.parent, copy, *copy.iterdir())
    with pytest.raises(StoreError, match=f"number {ANNA}") as refused:
        load(copy)  # nobody named that folder as a store
    name, value = shlex.split(refused.value.fix.partition("export ")[2])[0].split("=")
    monkeypatch.setenv(name, value)
    assert load(copy) == b"whole"


# ---- two users of one machine -----------------------------------------------------------------------------

AS_USER = """
    import grp, json, os, pwd, sys, tempfile
    sys.path[:0] = [{tests!r}, {tests!r} + "/build"]
    from test_store import RECIPE, FakeBackend
    from helpers import backends, build, cli, inspect, load, store
    from helpers.bench import run
    from helpers.errors import CourseError
    from helpers.machine import doctor
    from helpers.model.sampling import SamplingParams

    user, stores = int(sys.argv[1]), os.environ.pop("COURSE_ENGINES")
    def as_user():
        global fake
        os.setgroups([]), os.setgid(user), os.setuid(user), os.umask(0o022)
        os.environ["COURSE_ENGINES"] = stores
    def use(work=lambda folder: None):
        global fake
        fake = FakeBackend(work)
        backends.module = lambda name: fake
    def told(call):
        try:
            return call()
        except CourseError as error:
            return f"{{type(error).__name__}}: {{error}}"
    # The user may not be allowed to read this Python's own folder: what is imported late is imported now.
    if not {real!r}:
        use()
        with tempfile.TemporaryDirectory() as store_of_root:
            os.environ["COURSE_ENGINES"] = store_of_root
            build(RECIPE, quiet=True), load(RECIPE), inspect(RECIPE), cli.main(["list"]), doctor.check_engines()
            told(lambda: load("none"))
            use()
        as_user()
"""


@pytest.fixture
def place():
    """A folder that all users can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for part in (*Path(folder).parents, ROOT / "helpers", *(ROOT / "helpers").parents):
            if not part.stat().st_mode & stat.S_IXOTH:
                pytest.skip(f"another user cannot reach {part}")
        yield Path(folder)


def user_folder(place: Path, user: int, mode: int = 0o755) -> Path:
    folder = place / f"of-{user}"
    folder.mkdir(exist_ok=True)
    os.chown(folder, user, user)
    folder.chmod(mode)
    return folder


def start(user: int, code: str, *stores: Path, trusted: Path | str = "", real: bool = False) -> subprocess.Popen:
    script = textwrap.dedent(AS_USER.format(tests=str(ROOT / "tests"), real=real)) + textwrap.dedent(code)
    environment = {**os.environ, "COURSE_ENGINES": os.pathsep.join(map(str, stores))}
    environment |= {"COURSE_TRUSTED_ENGINES": str(trusted), "HOME": "/nowhere"}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(user)],
        cwd="/",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> tuple:
    """(what the code printed last, as JSON; all that it told)."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def run(*arguments, **settings) -> tuple:
    return end(start(*arguments, **settings))


@as_root
def test_a_user_reads_the_administrators_store_and_leaves_it_as_it_is(place):
    shared, own = place / "shared", user_folder(place, BERT)
    run(0, "print(json.dumps(build(RECIPE, quiet=True).name))", shared)
    before = everything(shared)
    (folder, content, listed, builds, other), told = run(
        BERT,
        """
        folder = build(RECIPE)
        other = build(RECIPE.replace(precision="bf16"), quiet=True)
        doctors = doctor.check_engines().found
        print(json.dumps([str(folder), load(RECIPE).decode(), doctors, fake.builds, str(other)]))
        """,
        own,
        shared,
    )
    assert Path(folder).parent == shared and content == "whole" and builds == 1 and Path(other).parent == own
    assert f"by root, in {shared}" in told and f"{shared} (read-only)" in listed
    assert everything(shared) == before
    assert {stat.S_IMODE(p.stat().st_mode) for p in own.rglob("*") if p.is_file() and p.suffix != ".lock"} == {0o644}


@as_root
@pytest.mark.parametrize("closed", [False, True])
def test_a_read_only_store_alone_serves_what_is_in_it_and_says_what_to_do_for_more(place, closed):
    """closed: to its owner too, as `chmod -R a-w` leaves it."""
    shared = place / "shared"
    run(0, "print(json.dumps(build(RECIPE, quiet=True).name))", shared)
    if closed:
        subprocess.run(["chmod", "-R", "a-w", shared], check=True)
    before = everything(shared)
    (hit, content, more, removed, benchmarked), _ = run(
        BERT,
        """
        with run._turn():
            pass
        answers = [str(build(RECIPE)), load(RECIPE).decode(), told(lambda: build(RECIPE.replace(precision="bf16")))]
        print(json.dumps([*answers, told(lambda: store.remove(answers[0])), fake.builds]))
        """,
        shared,
    )
    assert Path(hit).parent == shared and content == "whole" and benchmarked == 0
    for refusal in (more, removed):
        assert refusal.startswith("StoreError") and f"export COURSE_ENGINES=~/engines:{shared}" in refusal
    assert everything(shared) == before


@as_root
def test_an_engine_in_a_folder_that_is_closed_to_the_user_is_not_told_as_missing(place):
    engine = user_folder(place, ANNA, 0o700) / "engine"
    refusal, _ = run(BERT, f"print(json.dumps(told(lambda: load({str(engine)!r}))))", user_folder(place, BERT))
    assert "You may not read engine 'engine'" in refusal


@as_root
def test_an_engine_of_a_stranger_loads_only_from_a_store_that_is_named_as_trusted(place):
    shared = place / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    run(ANNA, "print(json.dumps(build(RECIPE, quiet=True).name))", shared)
    code = """
        answers = [told(lambda: str(call())) for call in (lambda: load(RECIPE), lambda: build(RECIPE))]
        answers.append(told(lambda: str(build(RECIPE, force=True, quiet=True))))
        print(json.dumps([*answers, fake.builds]))
        """
    (loaded, found, replaced, builds), _ = run(BERT, code, shared)
    for refusal in (loaded, found):
        assert f"belongs to another user, number {ANNA}" in refusal
        assert f"export COURSE_TRUSTED_ENGINES={shared}" in refusal
    assert "may not replace" in replaced and builds == 0
    (loaded, found, replaced, builds), told = run(BERT, code, shared, trusted=shared)
    assert loaded == "b'whole'" and Path(found).parent == shared and f"by number {ANNA}" in told
    assert "may not replace" in replaced and builds == 0
    own = user_folder(place, BERT)
    (loaded, found, replaced, builds), told = run(BERT, code, own, shared)
    assert "another user" in loaded and Path(found).parent == own and "in your own store" in told and builds == 2
    (kept,), _ = run(ANNA, "print(json.dumps([load(RECIPE).decode()]))", shared)
    assert kept == "whole"


@pytest.fixture
def open_store(place) -> tuple[Path, Path, str]:
    """A store that all may build in; a folder; and code that starts a build there, which waits until "go" is in it."""
    shared, side = place / "shared", user_folder(place, ANNA)
    shared.mkdir()
    shared.chmod(0o1777)
    code = f"""
        import time
        from pathlib import Path
        def work(folder):
            Path({str(side)!r}, "started").write_text("x")
            while not Path({str(side)!r}, "go").exists():
                time.sleep(0.02)
        use(work)
        """
    return shared, side, code


@as_root
@pytest.mark.parametrize("mode", [0o1777, 0o777])
def test_two_users_who_build_the_same_share_one_build_and_are_told(open_store, mode):
    shared, side, slowly = open_store
    shared.chmod(mode)
    code = """
        folder = build(RECIPE)
        print(json.dumps([folder.name, load(RECIPE).decode(), fake.builds]))
        """
    anna = start(ANNA, slowly + code, shared, trusted=shared)
    wait_for(side / "started")
    bert = start(BERT, code, shared, trusted=shared)
    waiting = ""
    while "waits for it" not in waiting:
        line = bert.stderr.readline()
        assert line, waiting
        waiting += line
    (side / "go").touch()
    (first, _, builds), _ = end(anna)
    assert builds == 1
    (second, content, builds), told = end(bert)
    assert second == first and content == "whole" and builds == 0
    assert "Cache hit" in told and f"by number {ANNA}" in told


@as_root
def test_a_killed_build_of_another_user_is_told_and_goes_with_that_users_next_build(open_store):
    shared, side, slowly = open_store
    anna = start(ANNA, slowly + "build(RECIPE)", shared)
    wait_for(side / "started")
    anna.kill()
    anna.communicate()
    code = """
        answer = told(lambda: build(RECIPE.replace(max_batch_size=2), quiet=True).name)
        print(json.dumps([told(lambda: build(RECIPE, quiet=True).name), answer]))
        """
    (refused, other), _ = run(BERT, code, shared)
    (leftover,) = [path for path in shared.iterdir() if path.name.startswith(".building-")]
    assert refused.startswith("StoreError") and str(leftover) in refused and "COURSE_ENGINES=~/engines" in refused
    assert (shared / other / "manifest.json").exists()
    run(ANNA, "print(json.dumps(build(RECIPE.replace(max_batch_size=1), quiet=True).name))", shared)
    assert not leftover.exists()


@as_root
def test_a_real_engine_of_the_administrator_answers_another_user_as_it_answers_root(place, tiny_engine):
    shared = place / "shared"
    shutil.copytree(tiny_engine, shared / tiny_engine.name)
    before = everything(shared)
    (roots, users), _ = run(
        BERT,
        f"""
        from conftest import GREEDY, PROMPTS
        import shutil
        def answer(folder):
            with load(folder) as engine:
                return engine.generate(PROMPTS[:1], GREEDY)[0].token_ids
        with tempfile.TemporaryDirectory() as copy:
            os.environ["COURSE_ENGINES"] = copy
            roots = answer(shutil.copytree({str(tiny_engine)!r}, copy + "/" + {tiny_engine.name!r}))
        as_user()
        print(json.dumps([list(roots), list(answer({tiny_engine.name!r}))]))
        """,
        user_folder(place, BERT),
        shared,
        real=True,
    )
    assert users == roots and len(users) > 3
    assert everything(shared) == before
