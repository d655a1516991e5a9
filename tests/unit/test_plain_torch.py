"""torch's process-wide settings around engines, where several threads use them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

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


def test_what_a_notebook_sets_while_a_thread_is_inside_is_kept(half):
    with plain_torch():
        torch.set_default_dtype(torch.float64)
    assert torch.get_default_dtype() == torch.float64


@pytest.mark.parametrize("warn_only", [False, True])
def test_an_engine_need_not_be_deterministic_where_a_notebooks_own_tensors_must(warn_only):
    """A GPU has no deterministic cumsum, so torch would refuse to sample."""
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        assert not is_plain()
        with plain_torch():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)
    assert is_plain()


def test_tensors_are_real_inside_whatever_torch_traces_and_what_watches_goes_on():
    def plain(x):
        assert not is_plain()
        with plain_torch():
            assert type(torch.ones(2) + 1) is torch.Tensor and (torch.ones(2) + 1).tolist() == [2, 2]
        return x + 1

    with FakeTensorMode(), FunctionalTensorMode():
        plain(1)
        assert type(torch.ones(2)) is not torch.Tensor
    make_fx(plain)(torch.ones(2))
    with FlopCounterMode(display=False) as counted, plain_torch():
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert is_plain() and counted.get_total_flops() == 16


def test_an_interrupt_while_torch_is_made_plain_leaves_a_notebook_its_settings(half, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("helpers.machine.plain_torch._full_precision", interrupted)
    with pytest.raises(KeyboardInterrupt), plain_torch():
        pass
    assert torch.get_default_dtype() == torch.float16
