"""What a killed run leaves, so that the next one continues: `OUTPUT.partial` with its stages.

Stages run in order, and one that is done leaves its files there. neural-compressor keeps nothing in
the middle of its own work, so a run that is killed while it quantizes does that stage again, from
its first block, and says so; what came before it stays.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from serve_app.core.errors import ConfigError

STAGES = ("source", "calibration", "quantize", "verify")
_STATE = "state.json"
_LOCK = "lock"


class RunState:
    """The folder of an unfinished run. A context manager: it holds a lock while it is open.

    `identity` is what makes two runs the same: the recipe and the source's files. Raises
    ConfigError where another run works on the folder now, or it belongs to one of another identity.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder = output.with_name(output.name + ".partial")
        self._identity = json.loads(json.dumps(identity))
        self._restart = restart
        self._lock: int | None = None
        self.done: list[str] = []
        self.interrupted: str | None = None

    def __enter__(self) -> RunState:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._close()
            raise ConfigError(
                f"--output: another xeray quantize is at work in {self.folder}", param="output"
            ) from None
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def path(self, name: str) -> Path:
        """Return where a stage puts its file or folder `name`."""
        return self.folder / name

    def is_done(self, stage: str) -> bool:
        """Whether an earlier run finished `stage`."""
        return stage in self.done

    def begin(self, stage: str) -> None:
        """Note that `stage` runs now."""
        self._write(stage)

    def finish(self, stage: str) -> None:
        """Note that the files of `stage` are complete."""
        if stage not in self.done:
            self.done.append(stage)
        self._write(None)

    def redo(self, stage: str) -> None:
        """Forget `stage` and those after it: what they left was found wanting."""
        self.done = [each for each in self.done if STAGES.index(each) < STAGES.index(stage)]
        self._write(None)

    def describe(self) -> str | None:
        """One line on what is kept and what is done again; None for a new run."""
        if not self.done and self.interrupted is None:
            return None
        kept = f"{', '.join(self.done)} kept" if self.done else "nothing kept"
        again = next((stage for stage in STAGES if stage not in self.done), None)
        tail = f"{again} is done again from its beginning" if self.interrupted == again else ""
        if not tail:
            tail = f"going on with {again}" if again else "all stages were done"
        return f"continuing {self.folder.name}: {kept}; {tail}"

    def remove(self) -> None:
        """Delete the folder: the run is complete."""
        shutil.rmtree(self.folder)

    def _read(self) -> None:
        path = self.folder / _STATE
        if self._restart:
            for each in self.folder.iterdir():
                if each.name != _LOCK:
                    shutil.rmtree(each) if each.is_dir() else each.unlink()
        if not path.is_file():
            self._write(None)
            return
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            identity, done = values["identity"], values["done"]
        except (OSError, ValueError, KeyError, TypeError):
            raise self._foreign("its state.json cannot be read") from None
        if identity != self._identity:
            differing = sorted(
                key
                for key in {*identity, *self._identity}
                if identity.get(key) != self._identity.get(key)
            )
            raise self._foreign(f"it is of a run with another {', '.join(differing)}")
        self.done = [stage for stage in STAGES if stage in done]
        self.interrupted = values.get("running")

    def _foreign(self, reason: str) -> ConfigError:
        return ConfigError(
            f"--output: {self.folder} cannot be continued, {reason}; add --restart to begin anew",
            param="output",
        )

    def _write(self, running: str | None) -> None:
        values = {"identity": self._identity, "done": self.done, "running": running}
        temporary = self.folder / (_STATE + ".new")
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.folder / _STATE)

    def _close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def source_identity(path: Path) -> dict[str, Any]:
    """Return what tells a model's files apart from others: names, sizes, times of change."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {
        each.name: [each.stat().st_size, each.stat().st_mtime_ns]
        for each in files
        if each.is_file()
    }
