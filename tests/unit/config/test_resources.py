from __future__ import annotations

from pathlib import Path

import pytest

import serve_app
from serve_app.config import resources
from serve_app.core.errors import ConfigError


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as a wheel lays it: data inside it, no checkout around it."""
    package = tmp_path / "site-packages" / "serve_app"
    configs = package / "_data" / "configs"
    configs.mkdir(parents=True)
    for name in ("local.yaml", "arc.yaml", "README.md"):
        (configs / name).write_text("# text\n")
    monkeypatch.setattr(serve_app, "__file__", str(package / "__init__.py"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return configs


def test_without_a_name_it_is_the_local_config(installed: Path) -> None:
    assert resources.find_config(None) == installed / "local.yaml"


@pytest.mark.parametrize("name", ["arc", "arc.yaml", "configs/arc.yaml"])
def test_names_of_packaged_configs(installed: Path, name: str) -> None:
    assert resources.find_config(name) == installed / "arc.yaml"


def test_a_file_of_the_user_wins(installed: Path) -> None:
    Path("configs").mkdir()
    own = Path("configs/arc.yaml")
    own.write_text("# mine\n")

    assert resources.find_config("configs/arc.yaml") == own


@pytest.mark.parametrize("name", ["nothing.yaml", "elsewhere/arc.yaml", "../arc.yaml"])
def test_what_does_not_exist_names_what_does(installed: Path, name: str) -> None:
    with pytest.raises(ConfigError) as error:
        resources.find_config(name)

    assert name in error.value.message
    assert "arc.yaml, local.yaml" in error.value.message


def test_a_folder_is_no_config(installed: Path) -> None:
    Path("configs").mkdir()
    for name in ("configs", ".", "..", "/"):
        with pytest.raises(ConfigError, match="is a folder"):
            resources.find_config(name)


def test_in_a_checkout_the_folders_beside_the_package_are_used(repository: Path) -> None:
    assert resources.data_folder("configs") == repository / "configs"
