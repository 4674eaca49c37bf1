from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from serve_app.text.detokenizer import Detokenizer
from serve_app.text.tokenizer import Tokenizer

ids_of_any_kind = st.lists(st.integers(0, 49151), max_size=40)
cut_points = st.lists(st.integers(0, 40), max_size=8)


def pieces(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(cuts), len(ids)]
    return [ids[a:b] for a, b in pairwise(edges)]


@given(ids=ids_of_any_kind, cuts=cut_points, skip=st.booleans())
def test_pieces_join_to_the_whole(
    embedded: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    detokenizer = Detokenizer(embedded, skip_special_tokens=skip)

    text = "".join(detokenizer.push(piece) for piece in pieces(ids, cuts)) + detokenizer.finish()

    assert text == embedded.decode(ids, skip)


@given(
    text=st.text(
        st.characters(min_codepoint=32, max_codepoint=0x3FFFF, exclude_categories=["Cs"]),
        max_size=30,
    )
)
def test_valid_text_never_shows_a_replacement(embedded: Tokenizer, text: str) -> None:
    ids = embedded.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(embedded)

    shown = [detokenizer.push([token_id]) for token_id in ids]

    assert "".join(shown) == text
    assert detokenizer.finish() == ""


def test_incomplete_character_is_held_back_and_ends_as_replacement(embedded: Tokenizer) -> None:
    first, *_ = embedded.encode("\U0001f9ff", add_special_tokens=False)
    detokenizer = Detokenizer(embedded)

    assert detokenizer.push([first]) == ""
    assert detokenizer.finish() == "\ufffd"
