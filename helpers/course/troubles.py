"""What notebook 05 needs to cause trouble without harm: copies to damage, and a process that may run out of memory."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from helpers.model.checkpoint import find_checkpoint


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()  # goes when Python ends


def copy_of(folder: Path) -> Path:
    """A copy of an engine or checkpoint in a temporary folder of its own, to be damaged at will."""
    return Path(shutil.copytree(folder, Path(tempfile.mkdtemp(dir=_scratch().name)) / folder.name))


def other_tokenizer(name: str = "stories") -> Path:
    """A copy of a checkpoint whose tokenizer numbers the same pieces in another order: each id moved up by one."""
    folder = copy_of(find_checkpoint(name).folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    special = {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"]["vocab"]
    ids = [i for i in sorted(vocabulary.values()) if i not in special]
    moved = dict(zip(ids, ids[1:] + ids[:1], strict=True))
    tokenizer["model"]["vocab"] = {piece: moved.get(i, i) for piece, i in vocabulary.items()}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return folder


def generate_within(megabytes: int, batch_size: int, input_len: int) -> dict[str, Any]:
    """Answer a batch in this process, which may take only so many megabytes more than it has. Called in a worker:
    the limit stays until the process ends. Linux only."""
    import resource

    from helpers.engine import load
    from helpers.model.sampling import SamplingParams
    from helpers.recipe import BuildRecipe

    recipe = BuildRecipe(
        backend="pytorch", device="cpu", max_batch_size=batch_size, max_input_len=input_len, max_seq_len=256
    )
    with load(recipe) as engine:
        engine.generate([[1, 2]], SamplingParams(max_tokens=2))  # what is only loaded when first needed
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + megabytes * 10**6,) * 2)
        answers = engine.generate([[1] * input_len] * batch_size, SamplingParams(temperature=0, max_tokens=4))
    return {"answers": len(answers), "tokens": sum(len(answer.token_ids) for answer in answers)}


CALLS = {"generate_within": generate_within}
