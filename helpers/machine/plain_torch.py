"""torch's process-wide settings as torch starts, around what must not depend on a notebook's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_lock = threading.Lock()
_inside: set[object] = set()  # one for each block, of any thread, that goes on now
_settings = contextlib.ExitStack()  # of the process; the first block sets them, the last one puts them back


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """torch as it starts: no autocast, no inference mode, no fake tensors, float32 and the CPU by default, float32
    products in full precision, any kernel of attention, any algorithm. What a notebook sets for its own tensors must
    not change an engine's."""
    import torch

    with (
        _real_tensors(),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        _plain_process(),
    ):
        yield


@contextlib.contextmanager
def _real_tensors() -> Iterator[None]:
    """Outside of the modes that torch traces in, as its own unset_fake_temporarily: no public function does it. A mode
    that watches, such as FlopCounterMode, stays."""
    import torch

    keys = torch._C._TorchDispatchModeKey
    modes = [torch._C._unset_dispatch_mode(key) for key in (keys.FAKE, keys.FUNCTIONAL, keys.PROXY)]
    try:
        yield
    finally:
        for mode in filter(None, modes):
            torch._C._set_dispatch_mode(mode)


@contextlib.contextmanager
def _plain_process() -> Iterator[None]:
    """What all threads share: it stays plain until the last engine that needs it so is done."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [backend for name, backend in SDPBackend.__members__.items() if name not in ("ERROR", "OVERRIDEABLE")]
    me = object()
    try:
        with _lock:
            if not _inside:
                _settings.callback(_put_back, torch.get_default_dtype())
                torch.set_default_dtype(torch.float32)
                if torch.are_deterministic_algorithms_enabled():  # a GPU has none for the running sum of sampling
                    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
                    _settings.callback(torch.use_deterministic_algorithms, True, warn_only=warn_only)
                    torch.use_deterministic_algorithms(False)
                _settings.enter_context(sdpa_kernel(kernels))
                _settings.enter_context(_full_precision())
            _inside.add(me)
        yield
    finally:
        with _lock:
            _inside.discard(me)
            if not _inside:  # also where an interrupt came before the block
                _settings.close()


def _put_back(dtype: torch.dtype) -> None:
    """The notebook's default type, unless it has set another one meanwhile."""
    import torch

    if torch.get_default_dtype() == torch.float32:
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products without TensorFloat32 and bfloat16 inside. torch has an older setting for all devices and a
    newer one for each; it refuses to read the older while the two differ."""
    import torch

    products = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before, older = [one.fp32_precision for one in products], _older_setting()
    torch.set_float32_matmul_precision("highest")  # changes the newer ones too
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older or "highest")
        for one, precision in zip(products, before, strict=True):
            one.fp32_precision = precision


def _older_setting() -> str:
    import torch

    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return ""


def is_plain() -> bool:
    """Whether the settings that can change from step to step are as torch starts, and not only as long as another
    thread needs them so. Takes two microseconds."""
    import torch

    cuda = torch.backends.cuda
    return (
        not _inside
        and not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))
        and not torch._C._len_torch_dispatch_stack()
        and not torch.are_deterministic_algorithms_enabled()
        and torch.get_default_dtype() == torch.float32
        and cuda.math_sdp_enabled()
        and cuda.flash_sdp_enabled()
        and cuda.mem_efficient_sdp_enabled()
        and _older_setting() == "highest"
    )
