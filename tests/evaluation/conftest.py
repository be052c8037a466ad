from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The retrieval sets that stand beside the repository on a development machine."""
    path = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path}")
    return path
