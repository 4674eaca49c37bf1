from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="the build backend, which `make wheel` installs")

from serve_app.cli.build_hook import data_files


def test_hidden_and_compiled_files_stay_behind(tmp_path: Path) -> None:
    for name in (
        "configs/a.yaml",
        "configs/.b.yaml",
        "cluster/x/y.j2",
        "cluster/__pycache__/z.pyc",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    assert data_files(tmp_path) == [Path("cluster/x/y.j2"), Path("configs/a.yaml")]


@pytest.fixture(scope="module")
def wheel_names(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of the wheel, built from a copy of the checkout without any network."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source / name)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("serve_app", "configs", "cluster"):
        shutil.copytree(repository / name, source / name, ignore=ignored)
    build = (
        "from setuptools.build_meta import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", build, str(source)],
        cwd=source,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module(repository: Path, wheel_names: set[str]) -> None:
    modules = {
        str(path.relative_to(repository)) for path in (repository / "serve_app").rglob("*.py")
    }
    assert modules <= wheel_names


def test_the_wheel_holds_configs_cluster_and_web(repository: Path, wheel_names: set[str]) -> None:
    data = {f"serve_app/_data/{path}" for path in data_files(repository)}
    web = {
        str(path.relative_to(repository))
        for path in (repository / "serve_app/web").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    assert "serve_app/_data/configs/local.yaml" in wheel_names
    assert data | web <= wheel_names


def test_the_wheel_holds_nothing_else(wheel_names: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert "serve_app" in tops
    assert all(top == "serve_app" or top.endswith(".dist-info") for top in tops)
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)
