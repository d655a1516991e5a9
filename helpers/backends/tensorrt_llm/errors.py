"""What TensorRT-LLM 1.2.1 and the libraries under it say when something is wrong, and what it means: errors.json.

Each entry: words that mark the message, the error of ours that it becomes, the likely cause and the way out. The texts
come from the issues of NVIDIA/TensorRT-LLM named beside them and from its source around 1.2.1; users met them, we did
not run it. The first entry that matches counts, so causes stand before their consequences.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from helpers import errors
from helpers.errors import BackendUnavailable, CourseError, WorkerError

FIXES = {
    "environment": "Make the environment anew: helpers env create trtllm; or use NVIDIA's container (compose.yaml).",
    "rebuild": "Build the recipe again here: build(recipe, force=True).",
    "smaller": "Build with a smaller max_batch_size, max_num_tokens or max_seq_len, and close what else is on the GPU.",
}
KNOWN: list[dict[str, str]] = json.loads(Path(__file__).with_name("errors.json").read_text(encoding="utf-8"))

# Exceptions that are only the consequence of what stands in the log.
_POINTERS = ("engine building failed, please check the error log", "failed to deserialize", "self.engine is not none")


def explain_import(message: str, what: str) -> CourseError:
    """The error for a library that was installed and cannot be imported."""
    return explain(message, what, otherwise=BackendUnavailable)


def explain(message: str, what: str, log: str = "", otherwise: type[CourseError] = WorkerError) -> CourseError:
    """Our error for an exception's text or, where that says too little, for what the library logged meanwhile."""
    complaints = "\n".join(line for line in log.splitlines() if re.search("error|assert|allocated", line, re.I))
    pointer = any(words in message.lower() for words in _POINTERS) or not message.strip()
    for text in (complaints, message) if pointer else (message, complaints):
        for entry in KNOWN:
            if entry["words"] in text.lower():
                line, fix = _line_with(text, entry["words"]), FIXES.get(entry["fix"], entry["fix"])
                kind: type[CourseError] = getattr(errors, entry["error"])
                return kind(f"{what} TensorRT-LLM says: {line}", cause=entry["cause"], fix=fix)
    return otherwise(
        f"{what} TensorRT-LLM says: {message.strip()[:1500] or 'nothing'}",
        cause="This message is not among those that the course knows.",
        fix="Search for it in the issues of NVIDIA/TensorRT-LLM; the version here is 1.2.1.",
    )


def _line_with(text: str, words: str) -> str:
    lines = text.strip().splitlines()
    return next((line.strip() for line in lines if words in line.lower()), lines[0])[:500]
