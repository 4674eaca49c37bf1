"""Whoever takes part: a runner in a process of its own, or the service over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import select
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from serve_app.bench.load import LoadGenerator, RequestRecord, Target
from serve_app.bench.service import Service
from serve_app.bench.workloads import RequestSpec
from serve_app.core.errors import ConfigError, EngineError

_RUNNERS = Path(__file__).with_name("runners")
_STOP_TIMEOUT_S = 20.0
_ANSWER_TIMEOUT_S = 300.0
"""For loading a model, and for a batch: past it a contestant is left out, so a run always ends."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One batch: rates in tokens/s, the median first token, the most memory held so far.

    `decode` counts the tokens after the moment at which every sequence had its first one; `prefill`
    the prompts' tokens until then; `whole` the answers' over the whole batch.
    """

    decode: float
    prefill: float
    whole: float
    ttft_s: float
    peak_bytes: int


class Contestant(Protocol):
    """Runs batches of prompts; `close` ends its processes."""

    name: str
    facts: dict[str, Any]

    def run(self, specs: Sequence[RequestSpec], num_output: int) -> Figures:
        """Generate `num_output` tokens after each prompt. Raises EngineError where it cannot."""
        ...

    def close(self) -> None:
        """End it."""
        ...


def figures_of(times_s: Sequence[Sequence[float]], num_prompt: int, peak_bytes: int) -> Figures:
    """Return the figures of a batch from the times of its tokens, in seconds from its start."""
    first_s = max(row[0] for row in times_s)
    end_s = max(row[-1] for row in times_s)
    num_after = sum(1 for row in times_s for time_s in row if time_s > first_s)
    return Figures(
        decode=num_after / (end_s - first_s) if end_s > first_s else 0.0,
        prefill=num_prompt / first_s,
        whole=sum(map(len, times_s)) / end_s,
        ttft_s=statistics.median(row[0] for row in times_s),
        peak_bytes=peak_bytes,
    )


class RunnerContestant:
    """A runner script of `runners` under `python`. Raises EngineError where it does not start.

    An answer that takes longer than `timeout_s` ends its process.
    """

    def __init__(
        self,
        name: str,
        python: Path,
        script: Path,
        options: dict[str, Any],
        timeout_s: float = _ANSWER_TIMEOUT_S,
    ) -> None:
        self.name = name
        self._timeout_s = timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        self._process = subprocess.Popen(
            [str(python), str(script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )
        try:
            self.facts: dict[str, Any] = self._answer("ready")
        except BaseException:
            self.close()
            raise

    def run(self, specs: Sequence[RequestSpec], num_output: int) -> Figures:
        """Send one batch to the runner and wait for its times."""
        prompts = [spec.body["prompt"] for spec in specs]
        assert self._process.stdin is not None, "made with a pipe"
        job = json.dumps({"prompts": prompts, "output_tokens": num_output})
        with contextlib.suppress(BrokenPipeError):  # it died: the answer below says how
            self._process.stdin.write(job + "\n")
            self._process.stdin.flush()
        times_s = self._answer("times_s")
        return figures_of(times_s, sum(map(len, prompts)), self._last["peak_bytes"])

    def close(self) -> None:
        """End the process: at its input's end, else by force."""
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._log.close()

    def _answer(self, key: str) -> Any:
        assert self._process.stdout is not None, "made with a pipe"
        # One line per job, read whole: nothing waits in the buffer when this looks at the pipe.
        if not select.select([self._process.stdout], [], [], self._timeout_s)[0]:
            self._process.kill()
            raise EngineError(f"{self.name}: no answer within {self._timeout_s:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"{self.name}: {self._how_it_died()}")
        self._last: dict[str, Any] = json.loads(line)
        if "error" in self._last:
            raise EngineError(f"{self.name}: {self._last['error']}")
        return self._last[key]

    def _how_it_died(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        return f"its process ended with {code}: {last}"


class ServiceContestant:
    """The service over HTTP, with the load generator as its client."""

    def __init__(self, name: str, service: Service, model: str) -> None:
        self.name = name
        self._service = service
        service.__enter__()
        self._target = Target.from_url(service.url, model)
        self.facts: dict[str, Any] = {"startup_s": service.startup_s}

    def run(self, specs: Sequence[RequestSpec], num_output: int) -> Figures:
        """Stream all answers at once. Raises EngineError where a request fails."""
        result = asyncio.run(LoadGenerator(self._target).run_closed(specs, len(specs)))
        for record in result.records:
            if record.error is not None or record.ttft_s is None:
                raise EngineError(f"{self.name}: {record.error or 'an empty answer'}")
        times_s = [_token_times(record) for record in result.records]
        num_prompt = sum(len(spec.body["prompt"]) for spec in specs)
        return figures_of(times_s, num_prompt, self._peak_bytes())

    def close(self) -> None:
        """Stop the service."""
        self._service.__exit__(None, None, None)

    def _peak_bytes(self) -> int:
        """Sum of VmHWM over the service's processes."""
        total = 0
        for pid in self._service.processes.snapshot():
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                continue  # it ended meanwhile
            total += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
        return total


def _token_times(record: RequestRecord) -> list[float]:
    """Times of a stream's tokens: those of a chunk lie evenly between the chunk before and it.

    A chunk holds several tokens. They are told by its share of the characters, for a stream may
    be slow while prompts are read beside it, and fast afterwards. Without text all lie evenly.
    """
    assert record.ttft_s is not None, "checked by the caller"
    count = max(record.num_output_tokens, 1)
    if not record.chunk_chars:
        return np.linspace(record.ttft_s, record.e2el_s, count).tolist()
    arrivals_s = list(itertools.accumulate(record.itls_s, initial=record.ttft_s))
    num_chars = list(itertools.accumulate(record.chunk_chars))
    positions = np.linspace(num_chars[0], num_chars[-1], count)
    return np.interp(positions, num_chars, arrivals_s).tolist()


def runner_script(name: str) -> Path:
    """Return the script of the runner `name`. ConfigError where the wheel lacks it."""
    path = _RUNNERS / f"run_{name}.py"
    if not path.is_file():
        raise ConfigError(f"the runner {path.name} is missing from this installation")
    return path
