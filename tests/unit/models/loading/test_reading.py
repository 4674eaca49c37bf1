"""Loading large folders: what is read ahead, what is told, and how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import torch

from serve_app.models.loading.progress import LoadProgress, progress_line
from serve_app.models.loading.read_ahead import ReadAhead, Span, reading_ahead

PIECE = 8 << 20
CHILD = """
import sys, torch
from pathlib import Path
from serve_app.models.loading import loader

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

torch.set_num_threads(1)
before = peak = anonymous()
told = []

def progress(done, total):
    global peak
    peak = max(peak, anonymous())
    told.append((done, total))

loaded = loader.load_model(Path(sys.argv[1]), dtype="bfloat16", progress=progress)
after = anonymous()
peak = max(peak, after)
assert told[-1][0] == told[-1][1], told[-1]
print(peak - before, peak - after, told[-1][1], loaded.weights_bytes)
"""


def write_sparse_folder(folder, hidden=2048, inner=5504, num_layers=3, vocab=32000):
    """A Llama folder of two shards whose tensors are holes: 600 MB that take no disk."""
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards = [{"model.embed_tokens.weight": [vocab, hidden]}, {"lm_head.weight": [vocab, hidden]}]
    shards[1]["model.norm.weight"] = [hidden]
    for index in range(num_layers):
        prefix, shard = f"model.layers.{index}.", shards[index % 2]
        for name in "qkvo":
            shard[f"{prefix}self_attn.{name}_proj.weight"] = [hidden, hidden]
        shard[f"{prefix}mlp.gate_proj.weight"] = [inner, hidden]
        shard[f"{prefix}mlp.up_proj.weight"] = [inner, hidden]
        shard[f"{prefix}mlp.down_proj.weight"] = [hidden, inner]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shard[f"{prefix}{name}.weight"] = [hidden]
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        weight_map |= dict.fromkeys(shapes, file)
        header, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_memory_of_a_load_is_the_networks_and_one_tensor(tmp_path):
    write_sparse_folder(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    peak, passing, total, weights = map(int, done.stdout.split())
    assert total > 550e6
    allowed = 2 * 32000 * 2048 + 4 * PIECE  # the largest tensor, and what the threads read into
    assert passing < allowed
    # What the network keeps as the file has it stays mapped: no anonymous memory.
    assert peak < weights + allowed


def test_spans_are_read_in_order_and_no_further_than_allowed(tmp_path):
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.truncate(20 * PIECE)
    ahead = ReadAhead([Span(path, 0, 10 * PIECE), Span(path, 10 * PIECE, PIECE + 5)], 3 * PIECE)
    wait_until(lambda: ahead.taken_bytes == 3 * PIECE)
    ahead.advance(2 * PIECE)
    wait_until(lambda: ahead.taken_bytes == 5 * PIECE)
    ahead.advance(100 * PIECE)
    wait_until(lambda: ahead.taken_bytes == 11 * PIECE + 5)
    ahead.close()


def wait_until(condition):
    tick = threading.Event()
    for _ in range(1000):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("it did not happen within 10 s")


def test_closing_ends_threads_that_wait(tmp_path):
    before = threading.active_count()
    ahead = ReadAhead([Span(tmp_path / "missing", 0, 50 * PIECE)], PIECE)
    wait_until(lambda: ahead.taken_bytes == PIECE)
    ahead.close()
    assert threading.active_count() == before


def test_small_files_are_not_read_ahead(tmp_path):
    before = threading.active_count()
    told = []
    with reading_ahead([Span(tmp_path / "a", 0, 5)], lambda *args: told.append(args)) as tell:
        assert threading.active_count() == before
        tell(5, 5)
    assert told == [(5, 5)]


def test_the_line_has_bar_bytes_and_rate():
    line = progress_line(3_500_000_000, 14_000_000_000, 2.0)
    assert line == "loading weights [#####...............] 25%, 3.5 of 14.0 GB, 1.75 GB/s"
    assert "100%" in progress_line(7, 7, 0.0)


def test_lines_come_at_most_every_half_second():
    times = iter([0.0, 0.2, 0.6, 0.7, 1.2])
    lines = []
    progress = LoadProgress(lines.append, clock=lambda: next(times))
    for read in (1, 2, 3, 4):
        progress(read * 10**9, 4 * 10**9)
    assert [line.split("] ")[1] for line in lines] == [
        "50%, 2.0 of 4.0 GB, 3.33 GB/s",
        "100%, 4.0 of 4.0 GB, 3.33 GB/s",
    ]
