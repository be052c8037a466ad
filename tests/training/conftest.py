"""One thread: equal bit by bit from run to run, and fast beside other work. And groups of ranks."""

from collections.abc import Iterator

import pytest
import torch

from tests.training.rank_process import Ranks


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="package")
def _ranks_begin(request: pytest.FixtureRequest) -> None:
    """As many ranks as will be asked for import beside the first tests, which leave a core free."""
    asked = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    if "run_ranks" in asked:
        request.getfixturevalue("run_ranks").begin(4 if "of_ranks" in asked else 2)


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.end()
