"""torch's process-wide settings as torch starts, around what must not depend on a notebook's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """torch as it starts: no autocast, no inference mode, float32 and the CPU by default. What a notebook sets for its
    own tensors must not change an engine's."""
    import torch

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


def is_plain() -> bool:
    """Whether the settings that can change from step to step are as torch starts. Takes a quarter of a microsecond."""
    import torch

    cast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return not cast and torch.get_default_dtype() == torch.float32
