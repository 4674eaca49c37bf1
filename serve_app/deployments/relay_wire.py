"""What travels over the token relay: frames as between engine and client, `[kind, …]`.

::

    replica → ingress   hello    version, token             once, first
                        chunks   [[key, chunk …] …]         one frame per flush, all its requests
                        load     replica id, load, [chain …]    see load_news

A plain chunk is [key, text, ids, prompt tokens, generated, cached, reasoning]; any other has all
the fields. Keys are the ingress's: a request that is tried again has another one.
"""

from __future__ import annotations

from dataclasses import asdict, astuple
from typing import Any

from serve_app.core.errors import ErrorInfo
from serve_app.core.requests import GenerateChunk, LogprobItem, ReplicaLoad

VERSION = 3

Chain = tuple[bytes, ...]
"""A prompt's beginning, as prefix_table.prefix_chain gives it."""


def pack_chunk(key: int, chunk: GenerateChunk) -> list[Any]:
    """Return a chunk as plain values."""
    plain: list[Any] = [
        key,
        chunk.text,
        chunk.token_ids,
        chunk.num_prompt,
        chunk.num_generated,
        chunk.num_cached,
        chunk.num_reasoning,
    ]
    if chunk.finish_reason is None and chunk.error is None and chunk.logprobs is None:
        return plain
    return [
        *plain,
        chunk.finish_reason,
        chunk.stop_reason,
        None if chunk.logprobs is None else [_pack_logprob(item) for item in chunk.logprobs],
        None if chunk.error is None else asdict(chunk.error),
    ]


def unpack_chunk(values: list[Any]) -> GenerateChunk:
    """Return what `pack_chunk` packed, without the key."""
    _, text, ids, num_prompt, num_generated, num_cached, num_reasoning, *rest = values
    if not rest:
        return GenerateChunk(
            text,
            tuple(ids),
            num_prompt=num_prompt,
            num_generated=num_generated,
            num_cached=num_cached,
            num_reasoning=num_reasoning,
        )
    finish_reason, stop_reason, logprobs, error = rest
    return GenerateChunk(
        text,
        tuple(ids),
        logprobs=None if logprobs is None else tuple(_unpack_logprob(item) for item in logprobs),
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        num_prompt=num_prompt,
        num_generated=num_generated,
        num_cached=num_cached,
        num_reasoning=num_reasoning,
        error=None if error is None else ErrorInfo(**error),
    )


def pack_load(load: ReplicaLoad) -> list[Any]:
    """Return a load as plain values."""
    return list(astuple(load))


def unpack_load(values: list[Any]) -> ReplicaLoad:
    """Return what `pack_load` packed."""
    return ReplicaLoad(*values)


def _pack_logprob(item: LogprobItem) -> list[Any]:
    return [item.token, item.logprob, item.bytes, item.top]


def _unpack_logprob(values: list[Any]) -> LogprobItem:
    token, logprob, raw, top = values
    return LogprobItem(token, logprob, tuple(raw), tuple((text, p, tuple(b)) for text, p, b in top))
