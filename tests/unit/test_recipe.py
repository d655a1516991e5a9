"""Recipes: what is refused, and that writing and reading give the same recipe back."""

import shutil
import signal
from pathlib import Path

import pytest

from helpers import BuildRecipe, build, load
from helpers import recipe as recipes
from helpers.engine import locate, needed
from helpers.errors import InputError, RecipeError, shown
from helpers.model.checkpoint import find_checkpoint
from helpers.recipe import tensorrt_llm

RECIPES = Path(__file__).parents[2] / "engines" / "recipes"


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("backend", "onnx", "aot"),
        ("backend", ["aot"], "str"),
        ("precision", "fp64", "bf16"),
        ("precision", "fp8", "int8"),  # another backend has it
        ("device", "tpu", "cuda"),
        ("optimization_level", 4, "0, 1, 2, 3"),
        ("optimization_level", -1, "0, 1, 2, 3"),
        ("optimization_level", True, "int"),
        ("model", "", "folder"),
        ("model", "   ", "folder"),
        ("model", "dummy:", "folder"),
        ("model", None, "str"),
        ("max_batch_size", 0, "1 to 1024"),
        ("max_batch_size", 1025, "1 to 1024"),
        ("max_batch_size", 1.0, "int"),
        ("max_batch_size", "4", "int"),
        ("max_input_len", 0, "from 1"),
        ("max_input_len", float("nan"), "int"),
        ("max_seq_len", 0, "from 3"),
        ("max_seq_len", 128, r"more than max_input_len \(128\)"),  # contradicts the default prompt length
        ("num_threads", -1, "from 0"),
        ("decode_batch_sizes", [2], r"max_batch_size \(1\)"),  # contradicts the default batch size
        ("decode_batch_sizes", [0], "1 to"),
        ("decode_batch_sizes", ["1"], "whole numbers"),
        ("decode_batch_sizes", 1, "tuple"),
        ("fusion", "all", "Fusion"),
        ("fusion.qkv", "yes", "true or false"),
        ("options", ["fast"], "dict"),
        ("options.path", Path("x"), "text"),
        ("options.ratio", float("inf"), "number"),
        ("options.deep", [[[[[[[[[[[]]]]]]]]]]], "text"),
    ],
)
def test_a_wrong_value_is_refused_naming_field_value_and_what_is_allowed(field, value, allowed):
    table, _, name = field.partition(".")
    with pytest.raises(RecipeError, match=allowed) as refused:
        BuildRecipe(**{table: {name: value} if name else value})
    assert f"field {field} is" in refused.value.what
    value = value[0] if field == "decode_batch_sizes" and isinstance(value, list) else value
    assert shown(value) in refused.value.what
    assert refused.value.fix


COMPILE_NOTHING = ("pytorch", "torch_compile", "tensorrt_llm_pytorch", "vllm")


@pytest.mark.parametrize(
    ("backend", "field", "value"),
    [
        *[(backend, "num_threads", 2) for backend in (*COMPILE_NOTHING, "tensorrt", "tensorrt_llm")],
        *[(backend, "decode_batch_sizes", (2,)) for backend in (*COMPILE_NOTHING, "tensorrt_llm")],
        *[(backend, "optimization_level", 0) for backend in COMPILE_NOTHING],
        *[(backend, "fusion", {"gate_up": False}) for backend in (*COMPILE_NOTHING, "tensorrt")],
    ],
)
def test_a_field_that_a_backend_would_ignore_is_refused(backend, field, value):
    recipe = BuildRecipe(backend=backend, precision="bf16", max_batch_size=4)
    with pytest.raises(RecipeError, match=f"{backend}' has no use for the recipe field {field}"):
        recipe.replace(**{field: value})
    assert recipe.replace(**{field: getattr(BuildRecipe(), field)}) == recipe  # the default is no wish


def test_a_level_that_is_given_twice_is_refused():
    assert BuildRecipe(backend="tensorrt", options={"optimization_level": 5}).options
    with pytest.raises(RecipeError, match="contradicts"):
        BuildRecipe(backend="tensorrt", optimization_level=1, options={"optimization_level": 5})


@pytest.mark.parametrize("option", ["strip_weights", "weight_streaming"])
def test_a_language_models_plans_keep_their_weights(option):
    """Its engine runs them as they are: nothing would bring stripped weights back, or set a budget for streaming."""
    with pytest.raises(RecipeError, match="single modules"):
        BuildRecipe(backend="tensorrt", options={option: True})


def test_threads_of_a_cpu_are_refused_for_a_gpu():
    with pytest.raises(RecipeError, match="num_threads is for CPUs"):
        BuildRecipe(device="cuda", num_threads=2)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_llm", "tensorrt_llm_pytorch", "vllm"])
def test_a_cpu_is_refused_where_engines_run_on_gpus_alone(backend):
    with pytest.raises(RecipeError, match="device is 'cpu'"):
        BuildRecipe(backend=backend, precision="bf16", device="cpu")


@pytest.mark.parametrize("backend", ["aot", "pytorch", "torch_compile", "vllm", "tensorrt_llm", "tensorrt"])
@pytest.mark.parametrize("option", ["trust_remote_code", "hf_overrides", "optimisation_level"])
def test_an_option_that_is_not_on_a_backends_list_is_refused(backend, option):
    with pytest.raises(RecipeError, match=option):
        BuildRecipe(backend=backend, precision="bf16", options={option: True})


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", ".hidden", "..", "x" * 101, "a\\b", "a b", "\0"])
def test_a_timing_cache_is_a_plain_file_name(name):
    with pytest.raises(RecipeError, match="timing_cache"):
        BuildRecipe(backend="tensorrt", options={"provider": "tensorrt", "timing_cache": name})
    assert BuildRecipe(backend="tensorrt", options={"provider": "tensorrt", "timing_cache": "mine.cache"})


def test_equal_recipes_have_equal_hashes():
    first, second = (BuildRecipe(backend="tensorrt", options={"compute_capabilities": ["8.9"]}) for _ in range(2))
    assert len({first, second, BuildRecipe()}) == 2


def test_what_is_written_into_options_later_is_another_recipes_or_refused():
    given = {"enforce_eager": True}
    first = BuildRecipe(backend="vllm", precision="bf16", options=given)
    given |= {"enforce_eager": False, "trust_remote_code": True}
    assert first.options == {"enforce_eager": True}
    first.options["trust_remote_code"] = True
    with pytest.raises(RecipeError, match="trust_remote_code"):
        load(first)
    compiled = BuildRecipe()
    compiled.options["unknown"] = 1
    for use in (build, locate, needed):
        with pytest.raises(RecipeError, match="unknown"):
            use(compiled)


def test_zero_tokens_a_step_is_tensorrt_llms_default_and_no_number_of_tokens():
    recipe = BuildRecipe(backend="tensorrt_llm", precision="bf16", options={"max_num_tokens": 0})
    assert tensorrt_llm.settings(recipe) == tensorrt_llm.settings(recipe.replace(options={}))
    with pytest.raises(RecipeError, match="max_num_tokens"):
        recipe.replace(options={"max_num_tokens": -1})


@pytest.mark.parametrize("make", [lambda: BuildRecipe().replace(max_batchsize=2), lambda: recipes.from_dict({"x": 1})])
def test_an_unknown_field_is_refused_with_the_list_of_fields(make):
    with pytest.raises(RecipeError, match="no field") as refused:
        make()
    assert "max_batch_size" in refused.value.fix


def test_an_unknown_fusion_switch_is_refused_with_its_full_name():
    with pytest.raises(RecipeError, match=r"fusion\.mlp") as refused:
        BuildRecipe(fusion={"mlp": True})
    assert "fusion.gate_up" in refused.value.fix


@pytest.mark.parametrize(
    "recipe",
    [
        BuildRecipe(),
        BuildRecipe(
            model="dummy:some/model", precision="int8", max_batch_size=8, decode_batch_sizes=[2, 4], num_threads=2
        ),
        BuildRecipe(backend="tensorrt_llm", precision="int4", device="cuda", optimization_level=0),
        BuildRecipe(fusion={"kernels": False, "qkv": False, "gate_up": False}),
        BuildRecipe(backend="tensorrt", options={"compute_capabilities": ["8.6", "8.9"], "refit": True}),
        BuildRecipe(backend="tensorrt", options={"compute_capabilities": ("8.6",)}),
        BuildRecipe(backend="tensorrt_llm", precision="bf16", options={"free_gpu_memory_fraction": 0.5}),
        BuildRecipe(model='C:\\models\\"quoted" \N{PARTY POPPER}é\x7f\n'),
    ],
)
def test_reading_what_was_written_gives_the_same_recipe(recipe, tmp_path):
    assert recipes.read(recipes.write(recipe, tmp_path / "recipe.toml")) == recipe
    assert recipes.from_dict(recipe.to_dict()) == recipe


def test_a_recipe_that_no_longer_fits_on_the_disk_leaves_the_earlier_one_whole(tmp_path):
    file = recipes.write(BuildRecipe(), tmp_path / "recipe.toml")
    resource = pytest.importorskip("resource")  # a limit on a file's size stands for the full disk
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(InputError, match="cannot be written.*\n.*disk is full"):
            recipes.write(BuildRecipe(precision="bf16"), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert recipes.read(file) == BuildRecipe() and list(tmp_path.iterdir()) == [file]


def test_a_recipe_of_an_editor_that_begins_files_with_a_byte_order_mark(tmp_path):
    file = recipes.write(BuildRecipe(), tmp_path / "recipe.toml")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert recipes.read(file) == BuildRecipe()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_file_reads_and_begins_with_a_comment(path):
    recipe = recipes.read(path)
    backend = "" if recipe.backend == "aot" else f"{recipe.backend}-"
    assert path.stem == f"{recipe.short_name.split('-')[0].lower()}-{backend}{recipe.precision}"
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_the_recipe_files_of_the_notebooks_are_there():
    names = {path.stem for path in RECIPES.glob("*.toml")}
    assert names >= {"stories-fp32", "stories-int8", "stories-bf16", "tinyllama-bf16"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model = stories", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
        (b"[model]\nname = 1", "field model"),
        (b"x = " + b"[" * 50_000, "not valid TOML"),
        (b"max_batch_size = " + b"9" * 5000, "not valid TOML"),
    ],
)
def test_a_bad_recipe_file_is_refused(content, words, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        recipes.read(path)


def test_a_missing_recipe_file_is_refused_with_the_names_that_are_there():
    with pytest.raises(RecipeError, match="fp23") as refused:
        recipes.read(RECIPES / "stories-fp23.toml")
    assert "stories-fp32.toml" in refused.value.fix
    with pytest.raises(RecipeError, match="cannot be read"):
        recipes.read(RECIPES)


def test_decode_graphs_are_for_one_for_the_most_and_for_what_was_asked():
    assert BuildRecipe().all_decode_batch_sizes == (1,)
    assert BuildRecipe(max_batch_size=8).all_decode_batch_sizes == (1, 8)
    assert BuildRecipe(max_batch_size=8, decode_batch_sizes=(4, 2, 4)).all_decode_batch_sizes == (1, 2, 4, 8)


LONG = ["x" * 240, "\N{CJK UNIFIED IDEOGRAPH-20000}" * 60]


@pytest.mark.parametrize(
    "model", ["stories", "owner/name", "dummy:owner/name", "../a b", ".", "/", "C:\\x", "模型", *LONG]
)
def test_the_engines_name_is_one_visible_folder(model):
    name = BuildRecipe(model=model, backend="tensorrt_llm", max_batch_size=1024).short_name
    assert Path(name).name == name and not name.startswith(".") and not set(name) & set('/\\: "')
    assert len(f".building-{name}-12345678".encode()) <= 255  # what file systems allow


@pytest.mark.parametrize("name", ["stories", "dummy:stories", "dummy:tinyllama-1.1b"])
def test_a_folder_here_does_not_change_what_a_plain_name_means(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = name.removeprefix("dummy:")
    shutil.copytree(find_checkpoint(name).folder, tmp_path / plain)
    assert find_checkpoint(name).name == name
    written = name.replace(plain, f"./{plain}")
    assert find_checkpoint(written).name == name.replace(plain, str(tmp_path / plain))
