"""OpenVINO GenAI's ContinuousBatchingPipeline, bare: `add_request` with ids, then `step`."""

from __future__ import annotations

import sys
import time
from typing import Any

from loop import Run, RunnerOptions, Times, serve

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # importing sends an event

import numpy as np  # noqa: E402
import openvino as ov  # noqa: E402
import openvino_genai as genai  # noqa: E402

_LARGEST_STEP = 256
"""Default tokens of one step, as the library's SchedulerConfig has it."""


def start(options: RunnerOptions) -> tuple[dict[str, Any], Run]:
    """Load a .gguf file with the library's own reader, or a folder with its IR."""
    settings = dict(options.settings)
    config = genai.SchedulerConfig()
    config.max_num_seqs = options.max_num_seqs
    config.max_num_batched_tokens = settings.pop("max_num_batched_tokens", _LARGEST_STEP)
    config.enable_prefix_caching = False
    config.cache_size = 2
    properties = {"INFERENCE_NUM_THREADS": options.num_threads, **settings}
    pipeline = genai.ContinuousBatchingPipeline(options.model, config, "CPU", properties)

    def run(prompts: list[list[int]], num_output: int) -> Times:
        return _run(pipeline, prompts, num_output)

    return {"version": genai.get_version(), "settings": options.settings}, run


def _run(pipeline: Any, prompts: list[list[int]], num_output: int) -> Times:
    wanted = genai.GenerationConfig()
    wanted.max_new_tokens = num_output
    wanted.ignore_eos = True
    wanted.stop_token_ids = {0}  # a folder without a generation_config.json has none
    wanted.set_eos_token_id(0)
    wanted.do_sample = False
    begin_s = time.perf_counter()
    handles = [
        pipeline.add_request(index, ov.Tensor(np.array([prompt], dtype=np.int64)), wanted)
        for index, prompt in enumerate(prompts)
    ]
    times: Times = [[] for _ in prompts]
    while pipeline.has_non_finished_requests():
        pipeline.step()
        now_s = time.perf_counter() - begin_s
        for row, handle in zip(times, handles, strict=True):
            while handle.can_read():
                (output,) = handle.read().values()
                row += [now_s] * len(output.generated_ids)
    if any(len(row) != num_output for row in times):
        raise RuntimeError("a sequence ended early: its prompt was ignored or the cache too small")
    return times


if __name__ == "__main__":
    serve(start)
