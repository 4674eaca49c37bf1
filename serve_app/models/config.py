"""NetworkConfig: a decoder's shape, read from a Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve_app.core.errors import ConfigError
from serve_app.models.config_errors import ARCHITECTURES, UnsupportedArchitectureError
from serve_app.models.config_errors import required as _required
from serve_app.models.config_errors import unsupported as _unsupported
from serve_app.models.loading.quantization.methods import check_quantization
from serve_app.models.sparse_config import (
    LatentConfig,
    MixtureConfig,
    num_extra_layers,
    read_latent,
    read_mixture,
)

__all__ = ["ARCHITECTURES", "NetworkConfig", "RopeScaling", "UnsupportedArchitectureError"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched past the context that the model was first trained on.

    `linear` needs `factor` alone; `llama3` the two frequency factors; `yarn` the betas. See the
    function of the same name in `serve_app.models.rope` for the formulas.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    is_truncated: bool = True


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Shape and traits of a decoder of the Llama family. Sizes count elements.

    With `latent`, heads have keys of `head_dim` and their rotary part is `rope_dim`; with
    `mixture`, `intermediate_size` is that of layers without experts. `num_extra_layers` counts
    layers of the checkpoint after the last that decoding does not use.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    rms_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_dim: int = 0
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    latent: LatentConfig | None = None
    mixture: MixtureConfig | None = None
    num_extra_layers: int = 0

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_position",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"model.path: the model's {name} is {getattr(self, name)}; it must be positive",
                    param="model.path",
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.path: {self.num_heads} query heads do not divide into"
                f" {self.num_kv_heads} key/value heads",
                param="model.path",
            )
        if self.rope_dim != (self.latent.rope_head_dim if self.latent else self.head_dim):
            raise _unsupported(f"rotary size {self.rope_dim} in heads of {self.head_dim}")


def config_from_hugging_face(values: Mapping[str, Any]) -> NetworkConfig:
    """Read the fields of a config.json, in the style of transformers 4 or 5.

    Raises UnsupportedArchitectureError for a model that this network would compute wrongly.
    """
    architecture = values.get("model_type", "")
    _check_hugging_face(values, architecture)
    num_heads = _required(values, "num_attention_heads")
    hidden_size = _required(values, "hidden_size")
    latent = read_latent(values, architecture)
    head_dim = values.get("head_dim") or hidden_size // num_heads
    if latent is not None:
        head_dim = latent.nope_head_dim + latent.rope_head_dim
    rope: dict[str, Any] = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    max_position = _required(values, "max_position_embeddings")
    attention_bias = bool(values.get("attention_bias", False))
    has_qkv_bias = architecture == "qwen2_moe" and bool(values.get("qkv_bias", True))
    scaling = _hugging_face_scaling(rope, max_position)
    return NetworkConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        num_layers=_required(values, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads if latent else values.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        intermediate_size=_required(values, "intermediate_size"),
        vocab_size=_required(values, "vocab_size"),
        max_position=stretched(max_position, scaling),
        rms_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0),
        rope_scaling=scaling,
        rope_dim=latent.rope_head_dim if latent else int(head_dim * partial),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "qwen2" or has_qkv_bias or attention_bias,
        output_bias=architecture in ("llama", "qwen3", "qwen3_moe") and attention_bias,
        mlp_bias=architecture == "llama" and bool(values.get("mlp_bias", False)),
        qk_norm=architecture in ("qwen3", "qwen3_moe"),
        latent=latent,
        mixture=read_mixture(values, architecture),
        num_extra_layers=num_extra_layers(values, architecture),
    )


def load_hugging_face_config(folder: Path) -> NetworkConfig:
    """Read `folder`/config.json. Raises ConfigError where it is missing or no JSON object."""
    return config_from_hugging_face(read_json(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model folder. Raises ConfigError, one line."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise ConfigError(
            f"model.path: cannot read {path.name}: {reason}", param="model.path"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"model.path: {path.name} is no JSON object", param="model.path")
    return values


def _check_hugging_face(values: Mapping[str, Any], architecture: str) -> None:
    if architecture not in ARCHITECTURES:
        raise _unsupported(f"architecture {architecture!r}")
    if values.get("quantization_config"):
        check_quantization(values["quantization_config"])
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise _unsupported(f"activation {activation!r}")
    slides = values.get("use_sliding_window", architecture == "mistral")
    if (slides and values.get("sliding_window")) or "sliding_attention" in (
        values.get("layer_types") or ()
    ):
        raise _unsupported("sliding-window attention")


def stretched(max_position: int, scaling: RopeScaling | None) -> int:
    """Positions that the scaling allows; llama3 configs state the stretched length themselves."""
    if scaling is None or scaling.kind == "llama3":
        return max_position
    return max(max_position, int(scaling.original_max_position * scaling.factor))


def _hugging_face_scaling(rope: Mapping[str, Any], max_position: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise _unsupported(f"rope scaling {kind!r}")
    original = rope.get("original_max_position_embeddings") or max_position
    factor = rope.get("factor") or max_position / original
    optional = {
        ours: float(rope[theirs])
        for ours, theirs in (
            ("low_freq_factor", "low_freq_factor"),
            ("high_freq_factor", "high_freq_factor"),
            ("beta_fast", "beta_fast"),
            ("beta_slow", "beta_slow"),
            ("attention_factor", "attention_factor"),
            ("mscale", "mscale"),
            ("mscale_all_dim", "mscale_all_dim"),
        )
        if rope.get(theirs) is not None
    }
    return RopeScaling(
        kind, float(factor), int(original), is_truncated=rope.get("truncate", True), **optional
    )
