from __future__ import annotations

from pathlib import Path

import pytest

from merging.user_folders import cache_folder, data_folder


def test_the_cache_can_be_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMALGAM_CACHE", "~/kept")
    assert cache_folder("analysis") == Path.home() / "kept" / "analysis"
    monkeypatch.delenv("AMALGAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder("analysis") == Path("/caches/amalgam/analysis")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("x") == Path.home() / ".cache" / "amalgam" / "x"


def test_what_was_made_can_be_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMALGAM_DATA", "/bucket")
    assert data_folder() == Path("/bucket")
    monkeypatch.delenv("AMALGAM_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert data_folder() == Path("/data/amalgam")
