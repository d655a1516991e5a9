"""What TensorRT-LLM 1.2.1 and the libraries under it say when something is wrong, and what it means: errors.json.

The texts come from the issues named beside them and from its source around 1.2.1; users met them, we did not run it.
"""

from __future__ import annotations

import re
from pathlib import Path

from helpers.errors import BackendUnavailable, CourseError, WorkerError
from helpers.messages import matches, read_cards

KNOWN = read_cards(Path(__file__).with_name("errors.json"))

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
        for card, _, line in matches(text, KNOWN):
            return card.as_error(f"{what} TensorRT-LLM says: {line}")
    return otherwise(
        f"{what} TensorRT-LLM says: {message.strip()[:1500] or 'nothing'}",
        cause="This message is not among those that the course knows.",
        fix="Search for it in the issues of NVIDIA/TensorRT-LLM; the version here is 1.2.1.",
    )
