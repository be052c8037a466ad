"""One thread: equal bit by bit from run to run, and fast beside other work."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
