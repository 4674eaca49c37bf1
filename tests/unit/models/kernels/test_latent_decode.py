"""Decode rows over paged latents: the twin against plain softmax, the kernel against its twin."""

from __future__ import annotations

import pytest
import torch

from serve_app.models.kernels.latent_decode import latent_decode, latent_decode_torch

BLOCK_SIZE = 16


def make_case(lengths, num_heads, latent, rope, dtype, device):
    batch, width = len(lengths), -(-max(lengths) // BLOCK_SIZE)
    num_blocks = batch * width + 1
    cache = torch.randn(num_blocks, BLOCK_SIZE, latent + rope, device=device).to(dtype)
    query = torch.randn(batch, num_heads, latent + rope, device=device).to(dtype)
    tables = (torch.randperm(num_blocks - 1, device=device) + 1).view(batch, width)
    return query, cache, tables, torch.tensor(lengths, device=device)


def plain(query, cache, tables, lens, scale, latent):
    rows = []
    for row, table, length in zip(query.double(), tables, lens.tolist(), strict=True):
        context = cache[table].flatten(0, 1)[:length].double()
        weights = (row @ context.T * scale).softmax(-1)
        rows.append(weights @ context[:, :latent])
    return torch.stack(rows)


def test_the_twin_is_plain_attention(assert_near):
    query, cache, tables, lens = make_case([1, 5, 16, 70], 3, 32, 8, torch.float32, "cpu")
    out = latent_decode_torch(query, cache, tables, lens, 70, 0.2, latent_dim=32)
    assert_near(out, plain(query, cache, tables, lens, 0.2, 32).float())


def test_the_twin_gives_zeros_where_there_is_no_context():
    query, cache, tables, lens = make_case([4, 20], 2, 16, 8, torch.float32, "cpu")
    lens[0] = 0
    out = latent_decode_torch(query, cache, tables, lens, 20, 0.2, latent_dim=16)
    assert not out[0].any()
    assert out[1].any()


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    ("lengths", "num_heads", "latent", "rope"),
    [([1, 33, 700, 1030], 16, 512, 64), ([3, 17], 128, 512, 64), ([90] * 9, 4, 32, 8)],
)
def test_the_kernel_is_its_twin(
    lengths, num_heads, latent, rope, batch_invariant, dtype, kernel_device, assert_near
):
    if dtype is torch.float32 and latent == 512:
        pytest.skip("a float32 tile of 512 does not fit the shared memory of each card")
    case = make_case(lengths, num_heads, latent, rope, dtype, kernel_device)
    options = {"latent_dim": latent}
    out = latent_decode(*case, max(lengths), 0.05, **options, batch_invariant=batch_invariant)
    assert_near(out, latent_decode_torch(*case, max(lengths), 0.05, **options))


def test_a_row_alone_has_the_same_bits(dtype, kernel_device):
    case = make_case([300, 20, 900, 513], 16, 64, 16, dtype, kernel_device)
    options = {"latent_dim": 64, "batch_invariant": True}
    together = latent_decode(*case, 1024, 0.1, **options)
    query, cache, tables, lens = case
    for row in range(4):
        only = slice(row, row + 1)
        alone = latent_decode(query[only], cache, tables[only], lens[only], 1024, 0.1, **options)
        assert torch.equal(alone[0], together[row])
