"""The stages around the algorithms, with one that rounds to the nearest in the test itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import ModelSection
from serve_app.core.errors import ConfigError
from serve_app.quantize import algorithms, pipeline
from serve_app.quantize.algorithms import Packed, quantization_config
from serve_app.quantize.folder import FolderWriter, read_tensors, tensor_shapes
from serve_app.quantize.pipeline import (
    Job,
    check_mixture,
    is_head_tied,
    linear_shapes,
    output_tensor,
    run_job,
)
from serve_app.quantize.recipe import Plan, Recipe, make_plan
from serve_app.quantize.scoring import open_scorer


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint codes [R, C] to int32 [R, C * bits / 32], the lowest bits first."""
    per_word = 32 // bits
    shifts = torch.arange(per_word) * bits
    words = (codes.long().view(codes.shape[0], -1, per_word) << shifts).sum(-1)
    return (words - (words >> 31 << 32)).to(torch.int32)


def round_to_nearest(weight: torch.Tensor, bits: int, group: int) -> dict[str, torch.Tensor]:
    """Symmetric groups in GPTQ's packing, version 1."""
    half = 1 << (bits - 1)
    groups = weight.float().view(weight.shape[0], -1, group)
    scales = (groups.abs().amax(-1) / (half - 1)).half()
    codes = (groups / scales.float()[..., None]).round().clamp(-half, half - 1) + half
    return {
        "qweight": pack(codes.flatten(1), bits).T.contiguous(),
        "scales": scales.T.contiguous(),
        "qzeros": pack(torch.full_like(scales.T, half - 1, dtype=torch.float32), bits),
    }


class Rounding:
    """In place of neural-compressor: counts its runs, and may fail in one or lose a tensor."""

    def __init__(self) -> None:
        self.runs = 0
        self.fails = False
        self.loses: str | None = None

    def __call__(self, source: Path, plan: Plan, calibration, work, *, device, on_block) -> Packed:
        self.runs += 1
        on_block(1, 2)
        if self.fails:
            raise KeyboardInterrupt
        return Packed(self._tensors(source, plan), quantization_config(plan))

    def _tensors(self, source: Path, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in read_tensors(source):
            module = name.removesuffix(".weight")
            bits = plan.bits_of(module)
            if name == self.loses:
                continue
            if bits is None or module == name:
                yield name, tensor.float()
                continue
            parts = round_to_nearest(tensor, bits, plan.recipe.group_size)
            yield from ((f"{module}.{part}", value) for part, value in parts.items())
            if f"{module}.bias" not in tensor_shapes(source):
                yield f"{module}.bias", torch.zeros(tensor.shape[0])


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> Rounding:
    double = Rounding()
    monkeypatch.setattr(pipeline, "quantize_folder", double)
    monkeypatch.setattr(pipeline, "check_installed", lambda: None)
    return double


def _job(folder: Path, output: Path, **changes: object) -> Job:
    recipe = Recipe(**{"algorithm": "rtn", **changes})  # type: ignore[arg-type]
    return Job(resolve_model(ModelSection(path=str(folder))), output, recipe)


@pytest.mark.parametrize("wide", [(), ("last:1", "v_proj")])
def test_a_folder_is_written_checked_and_loads(tiny_folder, tmp_path, rounding, wide):
    lines: list[str] = []
    result = run_job(_job(tiny_folder, tmp_path / "out", wide=wide), lines.append)
    assert result.verdict.engine == "native"
    assert lines[-1].startswith("verified: ")
    shapes = tensor_shapes(result.output)
    assert shapes["model.embed_tokens.weight"] == ((2048, 64), "BF16")
    assert not any(name.endswith(".bias") or name == "lm_head.weight" for name in shapes)
    config = json.loads((result.output / "config.json").read_text())["quantization_config"]
    assert config["packing_format"] == "auto_round:auto_gptq"
    assert {entry["bits"] for entry in config.get("extra_config", {}).values()} <= {8}
    assert Recipe.from_dict(config["xeray_recipe"]).wide == wide
    ids = torch.arange(5, 45)
    teacher, student = (
        open_scorer(path, "native", device="cpu", dtype="float32").logits(ids)
        for path in (tiny_folder, result.output)
    )
    assert torch.cosine_similarity(teacher, student, dim=-1).mean() > 0.9


def test_biases_and_an_own_head_stay(untied_folder, tmp_path, rounding):
    result = run_job(_job(untied_folder, tmp_path / "out"))
    shapes = tensor_shapes(result.output)
    assert shapes["lm_head.weight"] == ((2048, 64), "F32")
    assert shapes["model.layers.0.self_attn.q_proj.bias"][1] == "F32"


def test_a_killed_run_continues(tiny_folder, tmp_path, rounding):
    job, blocks = _job(tiny_folder, tmp_path / "out", num_samples=2), []
    rounding.fails = True
    with pytest.raises(KeyboardInterrupt):
        run_job(job, on_block=lambda done, total: blocks.append((done, total)))
    assert blocks == [(1, 2)]
    assert not job.output.exists()
    rounding.fails, lines = False, []
    run_job(job, lines.append)
    assert "quantize is done again from its beginning" in lines[0]
    assert job.output.is_dir()
    assert rounding.runs == 2


def test_a_lost_tensor_is_never_success(tiny_folder, tmp_path, rounding):
    rounding.loses = "model.layers.1.mlp.up_proj.weight"
    job = _job(tiny_folder, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"model.layers.1.mlp.up_proj.qweight is missing and 2"):
        run_job(job)
    assert not job.output.exists()
    rounding.loses = None
    run_job(job)
    assert rounding.runs == 2


def test_logits_that_are_not_finite_are_never_success(tiny_folder, tmp_path, monkeypatch, rounding):
    def poisoned(source: Path, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in Rounding._tensors(rounding, source, plan):
            is_hit = name == "model.layers.0.mlp.up_proj.scales"
            yield name, torch.full_like(tensor, float("nan")) if is_hit else tensor

    monkeypatch.setattr(rounding, "_tensors", poisoned)
    with pytest.raises(ConfigError, match="finite"):
        run_job(_job(tiny_folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_exists_is_not_overwritten(tiny_folder, tmp_path, rounding):
    with pytest.raises(ConfigError, match="exists; name a new folder"):
        run_job(_job(tiny_folder, tmp_path))
    assert rounding.runs == 0


def test_a_quantized_model_is_not_quantized_again(tiny_folder, tmp_path, rounding):
    first = run_job(_job(tiny_folder, tmp_path / "out")).output
    with pytest.raises(ConfigError, match="is quantized already"):
        run_job(_job(first, tmp_path / "again"))


def test_linear_shapes_leave_out_what_is_looked_up_or_routes(tiny_folder, tmp_path):
    names = linear_shapes(tiny_folder)
    assert len(names) == 14
    assert "lm_head" not in names
    (tmp_path / "config.json").write_text("{}")
    with FolderWriter(tmp_path) as writer:
        for name in ("model.layers.0.mlp.gate", "model.layers.0.mlp.experts.0.up_proj", "lm_head"):
            writer.add(name + ".weight", torch.zeros(4, 64))
    shapes = linear_shapes(tmp_path)
    assert set(shapes) == {"model.layers.0.mlp.experts.0.up_proj", "lm_head"}
    check_mixture(make_plan(shapes, Recipe(algorithm="autoround")))
    with pytest.raises(ConfigError, match="take autoround"):
        check_mixture(make_plan(shapes, Recipe(algorithm="gptq")))


def test_output_tensors_keep_their_type_and_refuse_what_would_be_lost(untied_folder):
    shapes = linear_shapes(untied_folder)
    plan = make_plan(shapes, Recipe())
    original = tensor_shapes(untied_folder)

    def out(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        return output_tensor(name, tensor, original, plan, is_tied=is_head_tied(untied_folder))

    layer = "model.layers.0.mlp.up_proj"
    assert out("model.norm.weight", torch.ones(64).double()).dtype == torch.float32
    assert out(f"{layer}.scales", torch.ones(2, 128)).dtype == torch.float16
    assert out(f"{layer}.bias", torch.zeros(128)) is None
    assert out(f"{layer}.g_idx", torch.arange(64) // 32) is None
    for name, tensor in (
        (f"{layer}.bias", torch.ones(128)),
        (f"{layer}.g_idx", torch.arange(64).flip(0) // 32),
        ("model.layers.0.stray", torch.ones(1)),
    ):
        with pytest.raises(ConfigError, match="which the source does not have"):
            out(name, tensor)


def test_without_the_extra_one_line_tells_what_to_install(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(algorithms.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'xeray\[quantize\]'"):
        run_job(_job(tiny_folder, tmp_path / "out"))


def test_shards_have_an_index(tmp_path):
    tensors = {f"t{index}": torch.full((4,), float(index)) for index in range(5)}
    with FolderWriter(tmp_path, max_shard_bytes=32) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / shard)[name], tensors[name])
    assert dict(read_tensors(tmp_path)).keys() == tensors.keys()
