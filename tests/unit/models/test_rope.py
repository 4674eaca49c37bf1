from __future__ import annotations

import pytest
import torch

from serve_app.models.config import config_from_hugging_face
from serve_app.models.layers import apply_rotary
from serve_app.models.rope import inverse_frequencies, rotary_table

SCALINGS = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-mscale": {
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "beta_fast": 24,
        "beta_slow": 2,
    },
    "yarn-truncate": {
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
        "attention_factor": 1.5,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_equal_transformers(name):
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = SCALINGS[name] | {"rope_type": name.split("-")[0], "rope_theta": 500000.0}
    theirs = transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope
    )
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu")
    frequencies, our_factor = inverse_frequencies(config_from_hugging_face(theirs.to_dict()))
    torch.testing.assert_close(frequencies, expected, rtol=2e-6, atol=0)
    assert our_factor == pytest.approx(factor)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    frequencies = 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)
    cos, sin = rotary_table(frequencies, 1.0, 64)
    x = torch.randn(1, 1, 16).expand(64, 2, 16).clone()
    original = x.clone()
    apply_rotary(x, cos[:, None], sin[:, None])
    torch.testing.assert_close(x.norm(dim=-1), original.norm(dim=-1))
    torch.testing.assert_close(x[0], original[0])
    distance_five = (x[5:, 0] * x[:-5, 0]).sum(-1)
    torch.testing.assert_close(distance_five, distance_five[:1].expand(59), rtol=1e-3, atol=1e-3)
