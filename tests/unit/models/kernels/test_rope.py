import pytest
import torch

from serve_app.models.kernels.rope import rope_and_cache, rope_and_cache_torch

NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE, NUM_BLOCKS = 6, 2, 4, 5


def _inputs(dtype, head_dim, device="cpu", rows=7):
    width = (NUM_HEADS + 2 * NUM_KV_HEADS) * head_dim
    qkv = torch.randn(rows, width, device=device).to(dtype)
    angles = torch.randn(rows, head_dim // 2, device=device)
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, device=device)[:rows]
    shape = (2, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, head_dim)
    cache = torch.full(shape, 7.0, dtype=dtype, device=device)
    return qkv, angles.cos(), angles.sin(), slots, cache


def _rotate_as_complex(heads, cos, sin):
    first, second = heads.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def test_twin_rotates_and_writes_slots(dtype, assert_near):
    qkv, cos, sin, slots, cache = _inputs(dtype, 8)
    query = rope_and_cache_torch(qkv, cos, sin, slots, cache, NUM_HEADS)
    heads = qkv.view(7, -1, 8)
    assert_near(query, _rotate_as_complex(heads[:, :NUM_HEADS], cos, sin))
    flat = cache.view(2, -1, NUM_KV_HEADS, 8)
    assert_near(flat[0, slots], _rotate_as_complex(heads[:, NUM_HEADS:-NUM_KV_HEADS], cos, sin))
    assert torch.equal(flat[1, slots], heads[:, -NUM_KV_HEADS:])
    untouched = torch.ones(len(flat[0]), dtype=torch.bool)
    untouched[slots] = False
    assert (flat[:, untouched] == 7.0).all()


def test_twin_norms_heads_before_it_rotates(assert_near):
    qkv, cos, sin, slots, cache = _inputs(torch.float32, 8)
    q_weight, k_weight = torch.rand(8) + 0.5, torch.rand(8) + 0.5
    query = rope_and_cache_torch(
        qkv, cos, sin, slots, cache, NUM_HEADS, q_weight=q_weight, k_weight=k_weight
    )
    heads = qkv.view(7, -1, 8)[:, :NUM_HEADS].double()
    normed = torch.nn.functional.rms_norm(heads, (8,), q_weight.double(), 1e-6)
    assert_near(query, _rotate_as_complex(normed, cos, sin))


def test_one_weight_alone_is_refused():
    qkv, cos, sin, slots, cache = _inputs(torch.float32, 8)
    with pytest.raises(ValueError, match="come together"):
        rope_and_cache(qkv, cos, sin, slots, cache, NUM_HEADS, q_weight=torch.ones(8))


@pytest.mark.parametrize("head_dim", [16, 24, 128])
@pytest.mark.parametrize("has_norm", [True, False])
def test_kernel_is_the_twin(dtype, kernel_device, head_dim, has_norm, assert_near):
    qkv, cos, sin, slots, cache = _inputs(dtype, head_dim, kernel_device)
    weights = {}
    if has_norm:
        q_weight, k_weight = torch.rand(2, head_dim, device=kernel_device).to(dtype) + 0.5
        weights = {"q_weight": q_weight, "k_weight": k_weight}
    expected_cache = cache.clone()
    query = rope_and_cache(qkv, cos, sin, slots, cache, NUM_HEADS, **weights)
    expected = rope_and_cache_torch(qkv, cos, sin, slots, expected_cache, NUM_HEADS, **weights)
    assert_near(query, expected)
    assert_near(cache, expected_cache)


def test_kernel_takes_halves_of_a_wider_table(kernel_device, assert_near):
    qkv, cos, sin, slots, cache = _inputs(torch.float32, 16, kernel_device)
    wide_cos, wide_sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    query = rope_and_cache(qkv, wide_cos[:, :8], wide_sin[:, 8:], slots, cache, NUM_HEADS)
    assert_near(query, rope_and_cache_torch(qkv, cos, sin, slots, cache, NUM_HEADS))
