"""A runtime put in force by one test must not reach the next."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _settings_of_torch_come_back():
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(mode)
