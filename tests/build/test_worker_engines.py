"""Real engines, of the backends `pytorch` and `aot`, behind the worker protocol: what TensorRT-LLM and vLLM go through
on a GPU is tried here with engines that run on every machine. test_worker.py has the protocol by itself."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from conftest import limits

from helpers import BuildRecipe, SamplingParams, load
from helpers.backends.remote import RemoteEngine
from helpers.errors import OutOfMemory, WorkerError
from helpers.machine.worker import Worker
from helpers.model.checkpoint import find_checkpoint

PROMPTS = ["Once upon a time", "The fox"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)

# The calls of helpers/backends/remote.py, answered by an engine of this course.
SERVED = """
import os, resource, sys
import helpers
from helpers.recipe import from_dict

def start(engine):
    global served
    served = helpers.load(from_dict(engine) if isinstance(engine, dict) else engine)

def generate(prompts, sampling):
    ends = sampling.pop("end_ids")
    sampling = helpers.SamplingParams(**sampling)
    if len(prompts) == 1:
        for token in served.stream(prompts[0], sampling):
            print("a library prints"); os.write(1, b"native code prints\\n")
            yield [[0, token.token_id, token.elapsed_s]]
        return {"seconds": [0.0]}
    answers = served.generate(prompts, sampling)
    yield [[i, token, 0.0] for i, answer in enumerate(answers) for token in answer.token_ids]
    return {"seconds": [0.0] * len(prompts)}

def logits(prompt):
    return served.logits(prompt).tolist()

def leave(megabytes):
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)

CALLS = {"start": start, "generate": generate, "logits": logits, "leave": leave}
"""


@pytest.fixture
def served(tmp_path, monkeypatch):
    (tmp_path / "served.py").write_text(SERVED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def recipe(request, tiny_llama):
    """The recipe of a small random Llama. conftest.py builds its aot engine once for all tests."""
    small = limits(max_batch_size=1, max_input_len=16, max_seq_len=48)
    return BuildRecipe(model=str(tiny_llama), backend=getattr(request, "param", "pytorch"), **small)


@pytest.fixture
def remote(served, recipe, request):
    """remote(): the engine in a new worker."""
    if recipe.backend == "aot":
        request.getfixturevalue("tiny_engine")
    started = []

    def start():
        from dataclasses import asdict

        from helpers.model.tokenizer import load_tokenizer

        model = find_checkpoint(recipe.model)
        worker = Worker("served")
        worker.call("start", engine=asdict(recipe))
        tokenizer = load_tokenizer(model.folder)
        started.append(RemoteEngine(recipe, tokenizer, model.config.eos_token_ids, model.config.vocab_size, worker))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


@pytest.mark.parametrize("recipe", ["pytorch", "aot"], indirect=True)
def test_an_engine_in_a_worker_answers_as_it_does_in_this_process(remote, recipe, request):
    engine = remote()
    with load(recipe) as local:
        expected = local.generate(PROMPTS[0], GREEDY)[0]
        assert engine.generate(PROMPTS[0], GREEDY)[0].token_ids == expected.token_ids
        streamed = list(engine.stream(PROMPTS[0], GREEDY))  # whatever is printed meanwhile
        assert [token.token_id for token in streamed] == expected.token_ids
        assert "".join(token.text for token in streamed) == expected.text
        stop = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=expected.text[5:8])
        ended = local.generate(PROMPTS[0], stop)[0]
        assert ended.finish_reason == "stop" and len(ended.text) <= 5
        answers = [engine.generate(PROMPTS[0], stop)[0], local.generate(PROMPTS[0], stop)[0]]
        assert [(a.text, a.token_ids, a.finish_reason) for a in answers] == [(ended.text, ended.token_ids, "stop")] * 2
        assert (engine.logits(PROMPTS[1]) - local.logits(PROMPTS[1])).abs().max().item() < 1e-5


@pytest.mark.skipif(os.name != "posix", reason="signals have these names on POSIX only")
def test_an_engine_killed_in_the_middle_of_an_answer_is_reported_and_a_new_one_answers(remote):
    engine = remote()
    expected = engine.generate(PROMPTS[0], GREEDY)[0].token_ids
    os.kill(engine.worker.pid, signal.SIGSTOP)  # or a small engine is done before it is killed
    threading.Timer(0.5, os.kill, (engine.worker.pid, signal.SIGKILL)).start()
    with pytest.raises(WorkerError, match="SIGKILL"):
        list(engine.stream(PROMPTS[0], GREEDY))
    assert remote().generate(PROMPTS[0], GREEDY)[0].token_ids == expected


@pytest.mark.skipif(os.name != "posix", reason="signals have these names on POSIX only")
def test_an_engine_that_hangs_is_ended_at_the_time_limit(remote, monkeypatch):
    engine = remote()
    monkeypatch.setattr("helpers.backends.remote.TIME_LIMIT_S", 5.0)  # now: the end of this answer may be waited for
    engine.generate(PROMPTS[0], GREEDY)
    os.kill(engine.worker.pid, signal.SIGSTOP)  # as stuck as a kernel that never returns
    with pytest.raises(WorkerError, match="within 5 s"):
        engine.generate(PROMPTS[0], GREEDY)
    assert not psutil.pid_exists(engine.worker.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can limit a process's memory this way")
def test_an_engine_that_runs_out_of_memory_says_so_and_this_process_is_unharmed(served):
    """The address space is limited to 16 MB more than the loaded model; a full prefill needs several times that."""
    from dataclasses import asdict

    recipe = BuildRecipe(backend="pytorch", **limits(max_batch_size=64, max_input_len=200))
    prompts = [[5 + i % 100] * 200 for i in range(64)]
    with Worker("served") as worker:
        worker.call("start", engine=asdict(recipe))
        worker.call("leave", megabytes=16)
        sampling = {"temperature": 0.0, "max_tokens": 4, "end_ids": []}
        with pytest.raises((OutOfMemory, WorkerError)) as full:
            worker.call("generate", prompts=prompts, sampling=sampling)
    assert "memory" in f"{full.value} {full.value.cause}".lower() or "alloc" in str(full.value).lower()
    with load(recipe) as local:  # here, where nothing is limited, the same request is answered
        assert len(local.generate(prompts[:2], GREEDY)) == 2


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os._exit(5)", "exit code 5"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("raise ImportError('libmpi.so.40: cannot open shared object file')", "libmpi.so.40"),
        ("import os; print('starting'); os.write(1, b'{\"result\": \"forged\"}\\n'); CALLS = {}", ""),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="signals have these names on POSIX only")
def test_a_library_that_dies_or_prints_while_it_is_imported(tmp_path, monkeypatch, code, words):
    (tmp_path / "library.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if not words:
        Worker("library").close()  # what it printed is not taken for an answer
        return
    with pytest.raises(WorkerError, match=words):
        Worker("library")


def test_a_library_that_hangs_while_it_is_imported_has_a_time_limit(tmp_path, monkeypatch):
    (tmp_path / "library.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(WorkerError, match="within 3 s"):
        Worker("library", start_limit=3.0)


def test_an_engine_whose_parent_dies_in_the_middle_of_an_answer_ends_too(served, tiny_llama):
    code = f"""
    import os
    from dataclasses import asdict
    from helpers import BuildRecipe
    from helpers.machine.worker import Worker
    recipe = BuildRecipe(model={str(tiny_llama)!r}, backend="pytorch", device="cpu", max_batch_size=1,
                         max_input_len=16, max_seq_len=48)
    worker = Worker("served")
    worker.call("start", engine=asdict(recipe))
    sampling = dict(temperature=0.0, max_tokens=40, ignore_eos=True, end_ids=[])
    next(worker.stream("generate", prompts=[[5, 6, 7]], sampling=sampling))
    print(worker.pid, flush=True)
    os._exit(1)  # no clean-up of any kind
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=120
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    "served_code",
    [
        "def generate(**_): yield 5; return {'seconds': [0.0]}",
        "def generate(**_): yield [[7, 1, 0.0]]; return {'seconds': [0.0]}",  # a sequence that was not asked for
        "def generate(**_): yield [[0, 'a', 0.0]]; return {'seconds': [0.0]}",
        "def generate(**_): yield [[0, 1, None]]; return {'seconds': [0.0]}",
        "def generate(**_): return None; yield",
        "def generate(**_): return {'seconds': []}; yield",
    ],
)
def test_an_answer_that_is_no_engines_is_a_worker_error(tmp_path, monkeypatch, served_code):
    (tmp_path / "library.py").write_text(
        f"{served_code}\nCALLS = {{'generate': generate, 'logits': lambda **_: ['x']}}"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe = BuildRecipe(backend="pytorch", **limits())
    with RemoteEngine(recipe, None, (0,), 100, Worker("library")) as engine:
        with pytest.raises(WorkerError, match="no answer of an engine"):
            engine.generate([5, 6], GREEDY)
        assert not psutil.pid_exists(engine.worker.pid)
    again = RemoteEngine(recipe, None, (0,), 100, Worker("library"))
    with again, pytest.raises(WorkerError, match="no answer of an engine"):
        again.logits([5, 6])


COUNTING = """
import time

def generate(prompts, sampling):  # each answer repeats its prompt's first token
    for step in range(sampling["max_tokens"]):
        time.sleep(0.05)
        yield [[index, prompt[0], 0.05 * step] for index, prompt in enumerate(prompts)]
    return {"seconds": [0.0] * len(prompts)}

CALLS = {"generate": generate}
"""


def test_a_stream_dropped_while_another_thread_asks_takes_none_of_its_tokens(tmp_path, monkeypatch):
    (tmp_path / "library.py").write_text(COUNTING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with RemoteEngine(BuildRecipe(backend="pytorch", **limits()), None, (0,), 100, Worker("library")) as engine:
        for delay in (0.1, 0.8):  # while the worker still answers the stream, and while it answers the thread
            stream = engine.stream([7], GREEDY)
            next(stream)
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(engine.generate, [9], GREEDY)
                time.sleep(delay)
                stream.close()
            assert answer.result()[0].token_ids == [9] * GREEDY.max_tokens
