"""Frames between an engine's process and its client: 4 bytes of length (big-endian), then msgpack.

Both ends run the same version, so positions carry the meaning: ``[kind, ...]``::

    client → worker   config    once, first: the sections, threads, switches
                      submit    id, prompt ids, sampling
                      abort     id
                      configure, pause, resume, stats    number of the call, …
                      profile   number, steps, path of the trace
                      profile_end    number: take what there is
                      inject_fault   kind (only where the config frame allows it)
                      close
    worker → client   progress  stage, seconds        while loading
                      info      facts                 ready
                      failed    error                 cannot start
                      step      seconds, [event …], stats or nil     one per step
                      reply     number of the call, stats or nil, error or nil
                      profile   number, figures or nil, error or nil
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

import msgpack

from serve_app.core.errors import ConfigError, ErrorInfo, XeRayError, error_from_info
from serve_app.core.events import (
    EngineCapabilities,
    EngineInfo,
    EngineStats,
    FinishReason,
    TokenEvent,
    TokenLogprob,
)
from serve_app.core.sampling import Constraint, SamplingParams, TokenVocabulary

_LENGTH = struct.Struct(">I")
_SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))


def pack_frame(*parts: Any) -> bytes:
    """One frame of plain values."""
    body: bytes = msgpack.packb(parts)
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Puts frames together from a stream of bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[list[Any]]:
        """Take bytes in; yields each frame that is complete."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            end = start + _LENGTH.size + length
            if end > len(self._buffer):
                break
            frame: list[Any] = msgpack.unpackb(
                bytes(self._buffer[start + _LENGTH.size : end]), strict_map_key=False
            )
            yield frame
            start = end
        if start:
            del self._buffer[:start]


def pack_sampling(sampling: SamplingParams) -> dict[str, Any]:
    """The fields that differ from the defaults."""
    plain = SamplingParams()
    values = {
        name: value
        for name in _SAMPLING_FIELDS
        if (value := getattr(sampling, name)) != getattr(plain, name)
    }
    if sampling.constraint is not None:
        values["constraint"] = asdict(sampling.constraint)
    return values


def unpack_sampling(values: dict[str, Any]) -> SamplingParams:
    """The inverse of `pack_sampling`."""
    values = dict(values)
    if "stop_token_ids" in values:
        values["stop_token_ids"] = tuple(values["stop_token_ids"])
    if "logit_bias" in values:
        values["logit_bias"] = tuple((int(i), float(b)) for i, b in values["logit_bias"])
    if "constraint" in values:
        values["constraint"] = Constraint(**values["constraint"])
    return SamplingParams(**values)


def unpack_vocabulary(values: dict[str, Any]) -> TokenVocabulary:
    """A TokenVocabulary from what `dataclasses.asdict` made of it."""
    lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list | tuple)}
    return TokenVocabulary(**{**values, **lists})


def pack_event(event: TokenEvent) -> list[Any]:
    """A plain token is [id, ids], a first one has two facts more; others have all the fields."""
    if event.finish_reason is None and event.logprobs is None and event.prompt_logprobs is None:
        short = [event.request_id, event.new_token_ids]
        is_first = bool(event.num_cached_tokens) or event.queue_time_s is not None
        return [*short, event.num_cached_tokens, event.queue_time_s] if is_first else short
    return [
        event.request_id,
        event.new_token_ids,
        event.num_cached_tokens,
        event.queue_time_s,
        _pack_logprobs(event.logprobs),
        event.finish_reason,
        event.stop_token_id,
        _pack_logprobs(event.prompt_logprobs),
        asdict(event.error) if event.error else None,
        event.embedding,
    ]


def unpack_event(values: list[Any]) -> TokenEvent:
    """The inverse of `pack_event`."""
    request_id, ids, *rest = values
    num_cached, queue_time_s = rest[:2] if rest else (0, None)
    if len(rest) <= 2:
        return TokenEvent(
            request_id, tuple(ids), num_cached_tokens=num_cached, queue_time_s=queue_time_s
        )
    _, _, logprobs, reason, stop_id, prompt_logprobs, error, embedding = rest
    return TokenEvent(
        request_id,
        tuple(ids),
        logprobs=_unpack_logprobs(logprobs),
        finish_reason=None if reason is None else FinishReason(reason),
        stop_token_id=stop_id,
        num_cached_tokens=num_cached,
        prompt_logprobs=_unpack_prompt_logprobs(prompt_logprobs),
        error=None if error is None else ErrorInfo(**error),
        embedding=embedding,
        queue_time_s=queue_time_s,
    )


def _pack_logprobs(entries: Sequence[TokenLogprob | None] | None) -> list[Any] | None:
    if entries is None:
        return None
    return [e if e is None else (e.token_id, e.logprob, e.top) for e in entries]


def _unpack_logprobs(entries: list[Any] | None) -> tuple[TokenLogprob, ...] | None:
    return None if entries is None else tuple(_unpack_logprob(entry) for entry in entries)


def _unpack_prompt_logprobs(entries: list[Any] | None) -> tuple[TokenLogprob | None, ...] | None:
    if entries is None:
        return None
    return tuple(None if entry is None else _unpack_logprob(entry) for entry in entries)


def _unpack_logprob(entry: list[Any]) -> TokenLogprob:
    token_id, logprob, top = entry
    return TokenLogprob(token_id, logprob, tuple((i, p) for i, p in top))


def pack_error(error: XeRayError) -> list[Any]:
    """An exception's facts; its ErrorInfo alone does not tell ConfigError from EngineError."""
    return [isinstance(error, ConfigError), asdict(error.info())]


def unpack_error(values: list[Any]) -> XeRayError:
    """The exception that `pack_error` took apart."""
    is_config_error, fields_of_info = values
    info = ErrorInfo(**fields_of_info)
    if is_config_error:
        return ConfigError(info.message, param=info.param, code=info.code)
    return error_from_info(info)


def pack_stats(stats: EngineStats) -> list[Any]:
    """The values in the order of the fields."""
    return [getattr(stats, field.name) for field in fields(stats)]


def unpack_stats(values: list[Any]) -> EngineStats:
    """The inverse of `pack_stats`."""
    return EngineStats(*values)


def unpack_info(values: dict[str, Any]) -> EngineInfo:
    """An EngineInfo from what `dataclasses.asdict` made of it."""
    able = dict(values["capabilities"])
    able["batching_modes"] = tuple(able["batching_modes"])
    return EngineInfo(**{**values, "capabilities": EngineCapabilities(**able)})
