"""What the tests of data sets share."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """No network, no data folder and an empty cache; holds the addresses that were asked for."""
    asked: list[str] = []

    def urlopen(request: object, *args: object, **kwargs: object) -> None:
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.delenv("PYROVAE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked
