"""torch's process-wide settings around engines, where several threads use them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers.machine.plain_torch import is_plain, plain_torch


@pytest.fixture
def half():
    """A notebook whose own tensors are half as wide."""
    torch.set_default_dtype(torch.float16)
    yield
    torch.set_default_dtype(torch.float32)


def test_settings_stay_plain_until_the_last_thread_is_done(half):
    first, second = plain_torch(), plain_torch()
    with ThreadPoolExecutor(1) as other_thread:
        first.__enter__()
        other_thread.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float32
        assert not is_plain()  # whoever comes now must hold them too
        other_thread.submit(second.__exit__, None, None, None).result()
    assert torch.get_default_dtype() == torch.float16 and not is_plain()
