"""Build hook of the wheel: `configs/` and `cluster/` travel as `serve_app/_data/…`.

Named by `[tool.setuptools.cmdclass]` in pyproject.toml; setuptools loads this file by itself.
"""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_py import build_py

DATA_FOLDERS = ("configs", "cluster")
TARGET = Path("serve_app") / "_data"


def data_files(root: Path) -> list[Path]:
    """Return the files that travel, relative to `root`, sorted; nothing hidden or compiled."""
    found = (path for folder in DATA_FOLDERS for path in (root / folder).rglob("*"))
    relative = (path.relative_to(root) for path in found if path.is_file())
    return sorted(path for path in relative if not _is_left_out(path))


def _is_left_out(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


class BuildWithData(build_py):
    """`build_py` that also copies the data folders."""

    def run(self) -> None:
        """Build the modules; then, unless the install is editable, copy the data."""
        super().run()
        if not self.editable_mode:
            for source, target in self._data_mapping().items():
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(source, target)

    def get_source_files(self) -> list[str]:
        """Return the sources, the data among them, so that a source distribution has them too."""
        return [*super().get_source_files(), *map(str, data_files(Path()))]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return what `run` writes."""
        return [*super().get_outputs(include_bytecode), *self._data_mapping().values()]

    def get_output_mapping(self) -> dict[str, str]:
        """Return output → source, as setuptools asks of a build step."""
        mapping: dict[str, str] = super().get_output_mapping()
        return mapping | {target: source for source, target in self._data_mapping().items()}

    def _data_mapping(self) -> dict[str, str]:
        base = Path(self.build_lib) / TARGET
        return {str(path): str(base / path) for path in data_files(Path())}
