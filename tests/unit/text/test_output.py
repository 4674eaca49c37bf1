from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.errors import EngineError
from serve_app.core.events import FinishReason, TokenEvent, TokenLogprob
from serve_app.core.requests import GenerateChunk, GenerateRequest
from serve_app.core.sampling import SamplingParams
from serve_app.text.output import OutputProcessor
from serve_app.text.tokenizer import Tokenizer

EOS = 2


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def processor(tokenizer: Tokenizer, sampling: SamplingParams | None = None, **changes: Any) -> Any:
    request = GenerateRequest("r", (5, 6, 7), sampling or SamplingParams(), **changes)
    return OutputProcessor(tokenizer, request)


def event(*ids: int, **changes: Any) -> TokenEvent:
    return TokenEvent("r", tuple(ids), **changes)


def stop_event(*ids: int, stop: int = EOS, **changes: Any) -> TokenEvent:
    return event(*ids, finish_reason=FinishReason.STOP, stop_token_id=stop, **changes)


def feed(output: OutputProcessor, events: list[TokenEvent]) -> list[GenerateChunk]:
    return [chunk for item in events if (chunk := output.push([item])) is not None]


def test_tokens_become_text_and_eos_is_silent(embedded: Tokenizer) -> None:
    ids = ids_of(embedded, "Paris is it")
    chunks = feed(processor(embedded), [*(event(i) for i in ids), stop_event(EOS)])

    assert "".join(chunk.text for chunk in chunks) == "Paris is it"
    last = chunks[-1]
    assert (last.finish_reason, last.stop_reason, last.text) == ("stop", None, "")
    assert last.token_ids == (EOS,)
    assert (last.num_prompt, last.num_generated) == (3, len(ids) + 1)
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])


def test_other_stop_token_is_named_and_shown_only_if_asked(embedded: Tokenizer) -> None:
    (dot,) = ids_of(embedded, ".")

    (hidden,) = feed(processor(embedded), [stop_event(*ids_of(embedded, "a"), dot, stop=dot)])
    (shown,) = feed(
        processor(embedded, include_stop_str_in_output=True),
        [stop_event(*ids_of(embedded, "a"), dot, stop=dot)],
    )

    assert (hidden.text, hidden.stop_reason) == ("a", dot)
    assert (shown.text, shown.stop_reason) == ("a.", dot)


@given(
    words=st.lists(st.sampled_from(["x", "EN", "END", "D ", " é", "\U0001f9ff"]), max_size=8),
    size=st.integers(1, 4),
)
def test_stop_string_never_leaks_however_tokens_come(
    embedded: Tokenizer, words: list[str], size: int
) -> None:
    text = "".join(words)
    ids = ids_of(embedded, text)
    output = processor(embedded, stop=("END",))
    groups = [event(*ids[i : i + size]) for i in range(0, len(ids), size)]

    chunks = feed(output, [*groups, event(finish_reason=FinishReason.LENGTH)])

    shown = "".join(chunk.text for chunk in chunks)
    assert shown == text.split("END", 1)[0]
    assert output.is_stopped_by_string is ("END" in text)
    assert chunks[-1].finish_reason == ("stop" if "END" in text else "length")
    assert chunks[-1].stop_reason == ("END" if "END" in text else None)
    assert chunks[-1].num_generated == sum(len(chunk.token_ids) for chunk in chunks)


def test_tokens_behind_a_stop_string_do_not_count(embedded: Tokenizer) -> None:
    ids = ids_of(embedded, "one. two")
    output = processor(embedded, stop=(".",))

    chunk = output.push([event(*ids)])

    assert chunk is not None
    assert chunk.text == "one"
    assert len(chunk.token_ids) == chunk.num_generated < len(ids)
    assert output.is_finished
    assert output.push([event(*ids)]) is None


def test_stop_string_waits_for_min_tokens(embedded: Tokenizer) -> None:
    ids = ids_of(embedded, ". . . .")
    output = processor(embedded, SamplingParams(min_tokens=3), stop=(".",))

    chunks = feed(output, [event(i) for i in ids])

    assert chunks[-1].stop_reason == "."
    assert chunks[-1].num_generated == 3


def test_incomplete_character_at_the_end_is_a_replacement(embedded: Tokenizer) -> None:
    first, *_ = ids_of(embedded, "\U0001f9ff")

    chunks = feed(processor(embedded), [event(first), event(finish_reason=FinishReason.LENGTH)])

    assert "".join(chunk.text for chunk in chunks) == "\ufffd"


def test_logprobs_align_with_tokens(embedded: Tokenizer) -> None:
    ids = ids_of(embedded, "\U0001f9ff")
    entries = tuple(TokenLogprob(i, -0.5, ((i, -0.5), (65, -2.0))) for i in ids)
    prompt = (None, TokenLogprob(6, -1.0))

    (chunk,) = feed(processor(embedded), [event(*ids, logprobs=entries, prompt_logprobs=prompt)])

    assert chunk.logprobs is not None
    assert len(chunk.logprobs) == len(chunk.token_ids)
    joined = b"".join(bytes(item.bytes) for item in chunk.logprobs)
    assert joined.decode() == "\U0001f9ff"
    assert chunk.logprobs[0].token == "\ufffd"
    assert chunk.logprobs[0].top[1] == (
        embedded.token_text(65),
        -2.0,
        tuple(embedded.token_bytes(65)),
    )
    assert chunk.prompt_logprobs is not None
    assert chunk.prompt_logprobs[0] is None


def test_special_tokens_are_shown_only_if_asked(embedded: Tokenizer) -> None:
    ids = [*ids_of(embedded, "a"), 1]

    (skipped,) = feed(processor(embedded), [event(*ids)])
    (kept,) = feed(processor(embedded, skip_special_tokens=False), [event(*ids)])

    assert (skipped.text, kept.text) == ("a", "a<|im_start|>")


@pytest.mark.parametrize("error", [EngineError("boom").info(), None])
def test_engine_error_ends_the_request(embedded: Tokenizer, error: Any) -> None:
    output = processor(embedded)

    (chunk,) = feed(output, [event(finish_reason=FinishReason.ERROR, error=error)])

    assert chunk.error is not None
    assert chunk.error.status == 500
    assert chunk.finish_reason is None
    assert output.is_finished


def test_nothing_to_tell_is_none(embedded: Tokenizer) -> None:
    assert processor(embedded).push([]) is None
    assert processor(embedded).push([event()]) is None


def test_abort_and_cached_tokens_are_passed_on(embedded: Tokenizer) -> None:
    output = processor(embedded)

    chunks = feed(
        output, [event(65, num_cached_tokens=2), event(finish_reason=FinishReason.ABORTED)]
    )

    assert chunks[-1].finish_reason == "aborted"
    assert chunks[-1].num_cached == 2


def test_tokens_of_thinking_are_counted_and_told_with_each_chunk(embedded: Tokenizer) -> None:
    thinking, answer = ids_of(embedded, "hm hm</think>"), ids_of(embedded, "\n\nParis it is")
    events = [event(i) for i in (*thinking, *answer)]
    output = processor(embedded, reasoning_kind="deepseek_r1", starts_in_reasoning=True)
    chunks = feed(output, [*events, stop_event(EOS)])

    assert chunks[-1].num_reasoning == len(thinking)
    assert [chunk.num_reasoning for chunk in chunks[:3]] == [1, 2, 3]
    plain = feed(processor(embedded), [*events, stop_event(EOS)])
    assert plain[-1].num_reasoning is None


def test_special_tokens_that_were_asked_for_stay_in_the_text(embedded: Tokenizer) -> None:
    ids = [embedded.special_tokens[name] for name in ("<file_sep>", "<filename>")]
    output = processor(embedded, shown_special_tokens=("<filename>", "<no such token>"))
    chunks = feed(output, [event(*ids), stop_event(EOS)])

    assert "".join(chunk.text for chunk in chunks) == "<filename>"
