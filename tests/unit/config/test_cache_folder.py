from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.config.cache_folder import cache_folder


def test_the_variable_counts_where_it_is_a_whole_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder("engine") == Path("/cache/xeray/engine")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert cache_folder("engine") == Path("/home/me/.cache/xeray/engine")


def test_a_user_without_a_home_has_the_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert cache_folder("engine") == Path("/.cache/xeray/engine")
