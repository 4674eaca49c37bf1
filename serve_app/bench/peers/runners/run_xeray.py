"""XeRay's own engine of a config, as `xeray bench engine` runs it, behind the runners' protocol."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loop import Run, RunnerOptions, Times, serve

from serve_app.config.load import load_serve_file
from serve_app.core.sampling import SamplingParams
from serve_app.engine.devices import pin_threads
from serve_app.engine.factory import create_engine
from serve_app.engine.protocol import Engine


def start(options: RunnerOptions) -> tuple[dict[str, Any], Run]:
    """Load the engine of the config that `settings` names."""
    settings = options.settings
    app = load_serve_file(Path(settings["config"]), settings["overrides"]).app
    pin_threads(app.engine.num_threads, None)
    engine = create_engine(app.model, app.engine)
    info = engine.info
    facts = {
        "version": "",
        "settings": {
            "engine": info.engine,
            "dtype": info.dtype,
            "batch_invariant": info.capabilities.batch_invariant,
            **info.details,
        },
        "max_num_seqs": info.max_num_seqs,
        "startup": asdict(info)["startup_s"],
    }
    return facts, lambda prompts, num_output: _run(engine, prompts, num_output)


def _run(engine: Engine, prompts: list[list[int]], num_output: int) -> Times:
    sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
    rows: dict[str, list[float]] = {f"peers-{index}": [] for index in range(len(prompts))}
    begin_s = time.perf_counter()
    for name, prompt in zip(rows, prompts, strict=True):
        engine.submit(name, prompt, sampling)
    num_open = len(prompts)
    while num_open:
        events = engine.step()
        now_s = time.perf_counter() - begin_s
        for event in events:
            if event.error is not None:
                raise RuntimeError(event.error.message)
            rows[event.request_id] += [now_s] * len(event.new_token_ids)
            num_open -= event.finish_reason is not None
    return list(rows.values())


if __name__ == "__main__":
    serve(start)
