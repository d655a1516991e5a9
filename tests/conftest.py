"""Which tests can run on this machine (what cannot is skipped, and the report lists it with the reason), the engines
and prompts that tests share, and small random checkpoints.

Every engine of the tests lies in one temporary folder. To keep them between runs while working on something else:
COURSE_TEST_ENGINES=/some/folder pytest ...
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import promises
import pytest
from promises import attempts  # noqa: F401  (a fixture)

from helpers import SamplingParams
from helpers.model.stories import draw_corpus


@cache
def missing(marker: str) -> str:
    """Why tests with this marker cannot run here; empty if they can."""
    if marker == "gpu":
        import torch

        return "" if torch.cuda.is_available() else "needs an NVIDIA GPU (make test-gpu there)"
    if marker == "browser":
        return "" if importlib.util.find_spec("playwright") else "needs playwright: pip install -e '.[browser]'"
    if marker == "real_model":
        from helpers.errors import ModelError
        from helpers.model.checkpoint import find_checkpoint

        try:
            find_checkpoint("smollm2")
        except ModelError:
            return "needs the model smollm2: helpers model get smollm2"
        return ""
    if marker == "oldest":
        import torch

        return "" if torch.__version__.startswith("2.9.") else "needs the oldest versions: make test-oldest"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers():
        if reason := missing(marker.name):
            pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Two threads that spin for a core which another job holds make torch ten times slower; one is never much worse."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_turn():
    """A benchmark in a test asserts no time: it need not wait, for minutes, until a notebook's beside it has ended."""
    from helpers.bench import run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "user_id", lambda: f"test-{os.getpid()}")
        yield


# ---- engines ----------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """One folder of engines for the whole run: for all its processes, and for the notebooks too. So an engine is built
    once, and the engines of the person who runs the tests are neither seen nor changed."""
    # A shell has what it starts in the background ignore interrupts, and tests send some.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(promises.Table())
    if hasattr(config, "workerinput"):
        return  # a process of pytest-xdist inherits the variable
    # Kernels and workers share the cores with other processes of the run: threads that spin for one that is taken
    # make a notebook's build twenty times slower. Read by OpenMP where a process begins.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    kept = os.environ.get("COURSE_TEST_ENGINES")
    os.environ["COURSE_ENGINES"] = kept or tempfile.mkdtemp(prefix="course-engines-")
    if not kept:
        config.add_cleanup(lambda: shutil.rmtree(os.environ["COURSE_ENGINES"], ignore_errors=True))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A notebook takes minutes. pytest-xdist gives each process one run of the list: so each run begins with some."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    notebooks = [item for item in items if item.path.suffix == ".ipynb"]
    others = [item for item in items if item.path.suffix != ".ipynb"]
    size = -(-len(others) // processes)
    runs = [notebooks[i::processes] + others[i * size : (i + 1) * size] for i in range(processes)]
    items[:] = [item for run in runs for item in run]


@pytest.fixture(scope="session")
def built():
    """built(recipe): the engine's folder, compiled once for the whole session."""
    from helpers import build

    return partial(build, quiet=True)


def limits(**changes):
    return {"device": "cpu", "max_batch_size": 4, "max_input_len": 64, "max_seq_len": 256, **changes}


@pytest.fixture(scope="session")
def stories_fp32(built) -> Path:
    """The bundled model as users should ship it: fp32, packed weights, batches up to 4. Three graphs."""
    from helpers import BuildRecipe

    return built(BuildRecipe(**limits()))


@pytest.fixture(scope="session")
def aot(stories_fp32):
    """The engine of stories_fp32, loaded."""
    from helpers import load

    with load(stories_fp32) as engine:
        yield engine


class Scripted:
    """An engine whose next tokens are given, to see what the loop around a backend makes of them."""

    def __new__(cls, script, end_ids=(2,), tokenizer=None):
        import torch

        from helpers import BuildRecipe
        from helpers.backends.base import Engine
        from helpers.model.checkpoint import BUNDLED
        from helpers.model.tokenizer import load_tokenizer

        class Engine_(Engine):
            def _prefill(self, prompts):
                self.at = [0] * len(prompts)
                return self._decode(None)

            def _decode(self, tokens):
                following = torch.tensor([script[min(at, len(script) - 1)] for at in self.at])
                self.at = [at + 1 for at in self.at]
                return torch.nn.functional.one_hot(following, 2048) * 100.0

        return Engine_(BuildRecipe(**limits()), tokenizer or load_tokenizer(BUNDLED), end_ids, 2048)


@pytest.fixture(scope="session")
def stories_reference():
    """transformers' own model and tokenizer for the bundled model, used as its documentation says."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from helpers.model.checkpoint import BUNDLED

    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="session")
def tiny_engine(built, tiny_llama) -> Path:
    """A small random Llama of one layer with the bundled tokenizer. Two graphs."""
    from helpers import BuildRecipe

    return built(BuildRecipe(model=str(tiny_llama), **limits(max_batch_size=1, max_input_len=16, max_seq_len=48)))


@pytest.fixture
def own_engines(tiny_engine, tmp_path, monkeypatch) -> Path:
    """A folder of engines for this test alone, with a copy of the tiny engine in it. Returns that copy."""
    copy = tmp_path / "engines" / tiny_engine.name
    shutil.copytree(tiny_engine, copy)
    monkeypatch.setenv("COURSE_ENGINES", str(copy.parent))
    return copy


def whole(folder: Path) -> dict:
    """An engine's manifest, after every file was compared with it."""
    from helpers import store

    manifest = store.read_manifest(folder)
    store.verify(folder, manifest)
    return manifest


# ---- prompts ----------------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
STORIES = draw_corpus(20, "engines")
# Twenty beginnings, from one word to a third of a story.
PROMPTS = [" ".join(story.text.split()[: 1 + 2 * i]) for i, story in enumerate(STORIES)]


# ---- contract tests ---------------------------------------------------------------------------------------

STANDINS = Path(__file__).parent / "contract" / "standins"
MACHINES: dict[tuple, dict] = {}  # what the stand-in says of each machine that tests pretend


def trtllm_recipe(**changes):
    from helpers import BuildRecipe

    limits = {"max_batch_size": 4, "max_input_len": 64, "max_seq_len": 256}
    return BuildRecipe(**{"backend": "tensorrt_llm", "precision": "bf16", **limits, **changes})


def in_standin(code: str) -> str:
    """Run code that imports the stand-in itself, in a process of its own."""
    pytest.importorskip("pydantic", reason="the stand-in is made with pydantic, as TensorRT-LLM is")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(STANDINS), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def standin(monkeypatch, tmp_path):
    """The stand-ins of contract/ as the environment "trtllm", reached through a real worker process, and a folder of
    engines for this test alone. standin(GPU="8.6") sets one of their variables; contract/README.md lists them."""
    pytest.importorskip("pydantic", reason="the stand-in is made with pydantic, as TensorRT-LLM is")
    from helpers.backends.tensorrt_llm import backend as tensorrt_llm

    monkeypatch.setenv("COURSE_TRTLLM_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(STANDINS))
    monkeypatch.setenv("STANDIN_MPI", "broken")
    monkeypatch.setenv("COURSE_ENGINES", str(tmp_path / "engines"))
    ask = tensorrt_llm._machine.__wrapped__

    def machine(python):  # asking starts a process that imports torch: once for each machine that tests pretend
        key = tuple(os.environ.get(f"STANDIN_{name}", "") for name in ("GPU", "VERSION", "INSPECTOR"))
        if "import" in os.environ.get("STANDIN_FAIL", "") or key not in MACHINES:
            MACHINES[key] = ask(python)
        return MACHINES[key]

    monkeypatch.setattr(tensorrt_llm, "_machine", machine)

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(f"STANDIN_{name}", value if isinstance(value, str) else json.dumps(value))

    return change


# ---- checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(family, **changes): a folder with a small random model, written by transformers."""
    return lambda family, **changes: write_checkpoint(tmp_path_factory.mktemp(family), family, **changes)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """One layer, tied embeddings, 2 KV heads for 4 heads, and the bundled model's tokenizer."""
    from helpers.model.checkpoint import BUNDLED

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    write_checkpoint(folder, "llama", num_hidden_layers=1, vocab_size=2048, tie_word_embeddings=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder / name)
    return folder


def write_checkpoint(folder: Path, family: str, **changes) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": None,
    }
    config = AutoConfig.for_model(family, **{**shape, **changes})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # biases and norms too, which transformers starts at 0 and 1
            noise = torch.empty_like(weight).normal_(0, 0.1, generator=generator)
            weight.copy_(1 + noise if "norm" in name else noise)
    model.save_pretrained(folder)
    return folder
