from hypothesis import given
from hypothesis import strategies as st

from serve_app.deployments.prefix_table import (
    CHUNK_TOKENS,
    MAX_CHUNKS,
    STALE_PREFIX_S,
    PrefixTable,
    prefix_chain,
)


def prompt(first: int) -> list[int]:
    return [first * 10_000 + i for i in range(256)]


def test_a_salt_separates_prefixes() -> None:
    assert prefix_chain(prompt(1), "a") != prefix_chain(prompt(1), "b")
    assert prefix_chain(prompt(1), None) == prefix_chain(prompt(1), "")


def test_prefixes_go_stale_and_the_table_is_bounded() -> None:
    now_s = 100.0
    table = PrefixTable(lambda: now_s)
    chain = prefix_chain(prompt(1))
    table.remember("a", chain, capacity_tokens=1 << 20)
    assert table.num_hit_tokens("a", chain) == 256
    now_s += STALE_PREFIX_S + 1
    assert table.num_hit_tokens("a", chain) == 0

    for i in range(100):
        table.remember("a", prefix_chain(prompt(i)), capacity_tokens=100 * CHUNK_TOKENS)
    assert table.num_entries() <= 100
    assert table.num_hit_tokens("a", prefix_chain(prompt(99))) == 256
    assert table.num_hit_tokens("a", prefix_chain(prompt(3))) == 0


@given(st.lists(st.integers(0, 3), max_size=300), st.lists(st.integers(0, 3), max_size=300))
def test_chains_share_exactly_the_common_full_chunks(left: list[int], right: list[int]) -> None:
    common = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )
    chains = prefix_chain(left), prefix_chain(right)
    shared = sum(a == b for a, b in zip(*chains, strict=False))

    assert shared == common // CHUNK_TOKENS
    assert len(prefix_chain(left * 30)) <= MAX_CHUNKS
