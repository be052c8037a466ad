"""Where copies stand."""

import os
import tempfile
from pathlib import Path

import pytest

from bixse.copies import copies


def test_what_another_user_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes first could put a model there for others to load."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = copies()
    assert own.stat().st_mode & 0o077 == 0
    another = os.getuid() + 1
    (tmp_path / f"bixse-{another}").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: another)
    with pytest.raises(ValueError, match=f"bixse-{another} is another user's"):
        copies()
