"""A large file's digest is kept, and taken again wherever the file may be another."""

import os
import shutil
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from helpers import digests, progress
from helpers.digests import file_digest


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that is worth remembering, and counts as old; and how often a file was read."""
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setattr(digests, "LARGE", 1000)
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 2000)
    monkeypatch.setattr(digests, "SETTLED_S", -1.0)
    reads, read = [], digests._sha256
    monkeypatch.setattr(digests, "_sha256", lambda path: reads.append(path) or read(path))
    return path, reads


def test_a_link_that_leads_to_itself_is_an_error_of_the_system(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        digests.file_digest(tmp_path / "loop")


def test_a_large_file_is_read_once(large):
    path, reads = large
    assert len({file_digest(path) for _ in range(3)}) == 1 and len(reads) == 1
    assert file_digest(path, reread=True) and len(reads) == 2


def test_reading_a_file_is_shown_where_it_takes_long(large, monkeypatch):
    titles = []
    monkeypatch.setattr(digests, "shown_if_slow", lambda title, phase: titles.append(title) or nullcontext())
    file_digest(large[0])
    assert titles == ["Reading weights for its sha256, 0.0 GB"]


@pytest.mark.parametrize("quiet", [False, True])
def test_what_takes_long_is_shown_unless_all_is_quiet(monkeypatch, capsys, quiet):
    shown, plain = threading.Event(), progress.Progress.phase
    monkeypatch.setattr(progress.Progress, "phase", lambda *given: shown.set() or plain(*given))
    with progress.shown_if_slow("Reading it", "read"):
        pass
    assert not shown.is_set() and not capsys.readouterr().err
    monkeypatch.setattr(progress, "SILENT_S", 0.0)
    with progress.hushed(quiet), progress.shown_if_slow("Reading it", "read"):
        assert shown.wait(60)
        progress.say("A line.")
    written = capsys.readouterr().err
    assert (("Reading it" in written), ("A line." in written)) == (not quiet, not quiet)


def test_in_a_notebook_nothing_is_left_of_what_was_shown(monkeypatch):
    """Of an output without data JupyterLab draws nothing; an empty text is an empty line."""
    shown, outputs = threading.Event(), []

    class Output:
        def update(self, data, raw):
            outputs.append(data)
            shown.set()

    monkeypatch.setattr(progress, "_notebook_display", Output)
    monkeypatch.setattr(progress, "SILENT_S", 0.0)
    with progress.shown_if_slow("Reading it", "read"):
        assert shown.wait(60)
    assert "Reading it" in outputs[0]["text/plain"] and outputs[-1] == {}


def test_where_no_thread_can_start_nothing_is_shown_and_all_is_done(monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread")))
    with progress.shown_if_slow("Reading it", "read"):
        pass


def test_a_file_of_the_same_size_and_modification_time_is_read_again(large):
    path, reads = large
    before, digest = path.stat(), file_digest(path)
    path.write_bytes(b"b" * 2000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digest(path) != digest and len(reads) == 2


@pytest.mark.parametrize("hours", [-1, 0, 6])
def test_a_file_that_was_just_written_is_not_remembered(large, monkeypatch, hours):
    """It could change again without its times changing, within one tick of the clock."""
    path, reads = large
    monkeypatch.setattr(digests, "SETTLED_S", 60.0)
    os.utime(path, (time.time() + hours * 3600,) * 2)  # as copies and archives set it
    assert file_digest(path) == file_digest(path) and len(reads) == 2


def test_a_file_whose_time_is_still_to_come_is_read_once(large):
    """As archives from another time zone bring it: it would be read at each load until that time."""
    path, reads = large
    os.utime(path, (time.time() + 6 * 3600,) * 2)
    assert file_digest(path) == file_digest(path) and len(reads) == 1


@pytest.mark.parametrize("memory", ["{", "[]", '{"PATH": 3}', '{"PATH": [[1], 5]}', '{"PATH": [[1]]}', "\xff"])
def test_a_damaged_memory_means_reading_again(large, memory):
    path, reads = large
    digest = file_digest(path)
    file = digests.engines_folder() / digests.MEMORY
    file.write_text(memory.replace("PATH", str(path)), encoding="latin-1")
    assert file_digest(path) == digest and len(reads) == 2
    assert file_digest(path) == digest and len(reads) == 2  # it was written anew


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_remembered_file_that_may_not_be_looked_for_any_more_is_no_hindrance(large, tmp_path):
    path, reads = large
    (tmp_path / "theirs").mkdir()
    theirs = path.rename(tmp_path / "theirs" / "weights")
    digest = file_digest(theirs)
    shutil.copy2(theirs, path)
    (tmp_path / "theirs").chmod(0)
    user, folders = os.geteuid(), [f for f in tmp_path.parents if f.stat().st_uid == 0 and f != Path("/")]
    try:
        if user == 0:  # whom nothing is refused
            for folder in (tmp_path, *folders):
                folder.chmod(folder.stat().st_mode | 0o755)
            digests.engines_folder().chmod(0o777)
            os.chown(digests.engines_folder() / digests.MEMORY, 65534, 65534)
            os.seteuid(65534)
        assert [file_digest(path), file_digest(path)] == [digest] * 2 and len(reads) == 2
        assert str(path) in digests._memory()
    finally:
        os.seteuid(user)
        (tmp_path / "theirs").chmod(0o755)


def test_what_is_gone_is_forgotten_and_nothing_else_lies_in_the_folder(large, tmp_path):
    path, _ = large
    other = path.rename(tmp_path / "other")
    file_digest(other)
    other.rename(path)
    file_digest(path)
    assert list(digests._memory()) == [str(path)]
    assert [p.name for p in digests.engines_folder().iterdir()] == [digests.MEMORY]
