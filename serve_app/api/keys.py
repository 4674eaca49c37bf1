"""API keys: who may do what, how much of it, and what was used.

A file lists keys by the SHA-256 of their text; the text itself is nowhere. The file is read again
when it changes, without a restart. Limits are counted over the last 60 seconds by each ingress
replica, which grants its share of them; all of it runs on one event loop.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from serve_app.config.env import API_KEYS
from serve_app.core.errors import AuthenticationError, ConfigError, RateLimitError

_logger = logging.getLogger(__name__)

Scope = Literal["inference", "admin", "metrics"]
WINDOW_S = 60.0
MAX_KEY_NAME_CHARS = 64
_RELOAD_CHECK_S = 1.0
_EVENT_S = 1.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


class KeyEntry(BaseModel):
    """One key of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        min_length=1,
        max_length=MAX_KEY_NAME_CHARS,
        description="Who holds it; for logs and usage.",
    )
    sha256: str = Field(description="SHA-256 of the key, 64 hexadecimal digits.")
    scopes: tuple[Scope, ...] = Field(("inference",), description="What it may do.")
    models: tuple[str, ...] = Field(("*",), description="Model ids that it may use; * is all.")
    requests_per_minute: int | None = Field(None, gt=0, description="Requests in 60 s.")
    tokens_per_minute: int | None = Field(None, gt=0, description="Prompt and output tokens.")
    max_concurrent_requests: int | None = Field(None, gt=0, description="Requests in flight.")
    local_only: bool = Field(False, description="Its requests never leave for a fallback.")

    @field_validator("sha256")
    @classmethod
    def _check_digest(cls, value: str) -> str:
        value = value.lower()
        if not _DIGEST.fullmatch(value):
            raise ValueError("must be 64 hexadecimal digits; `xeray keys new` makes one")
        return value

    def allows_model(self, model_id: str) -> bool:
        """Return whether the key may use a model, by its id."""
        return "*" in self.models or model_id in self.models


class _KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[KeyEntry, ...]


@dataclass(slots=True)
class KeyUsage:
    """What a key did on this replica: events of the last minute, and totals since the start."""

    num_in_flight: int = 0
    num_requests: int = 0
    num_tokens: int = 0
    num_refused: int = 0
    requests: deque[float] = field(default_factory=deque)
    tokens: deque[tuple[float, int]] = field(default_factory=deque)
    window_tokens: int = 0

    def add_tokens(self, now_s: float, count: int) -> None:
        """Count tokens; those of one second are one event, so that a minute has few."""
        self.num_tokens += count
        self.window_tokens += count
        begun_s = now_s
        if self.tokens and now_s - self.tokens[-1][0] < _EVENT_S:
            begun_s, before = self.tokens.pop()
            count += before
        self.tokens.append((begun_s, count))

    def forget_old(self, now_s: float) -> None:
        """Drop what lies further back than the window."""
        while self.requests and self.requests[0] <= now_s - WINDOW_S:
            self.requests.popleft()
        while self.tokens and self.tokens[0][0] <= now_s - WINDOW_S:
            self.window_tokens -= self.tokens.popleft()[1]


@dataclass(slots=True)
class KeyLease:
    """One request of a key, from its admission to its end."""

    entry: KeyEntry
    _usage: KeyUsage
    _clock: Callable[[], float]
    _is_open: bool = True

    def add_tokens(self, count: int) -> None:
        """Count tokens that the request has used since it last told."""
        if count:
            self._usage.add_tokens(self._clock(), count)

    def close(self) -> None:
        """Give the place back. Safe to call again."""
        if self._is_open:
            self._is_open = False
            self._usage.num_in_flight -= 1


class KeyRing:
    """Finds the key of a request and counts its use. Asks for no key where none is configured.

    path: the YAML or JSON file, or None. env: where XERAY_API_KEYS may list plain keys.
    num_shares: ingress replicas that share the limits. clock: monotonic seconds.
    Raises ConfigError on a file that cannot be read or has an error.
    """

    def __init__(
        self,
        path: Path | None = None,
        env: Mapping[str, str] | None = None,
        num_shares: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._clock = clock
        self._num_shares = num_shares
        self._fixed = _keys_of_environment(os.environ if env is None else env)
        self._usage: dict[str, KeyUsage] = {}
        self._stamp = _stamp(path)
        self._next_check_s = clock() + _RELOAD_CHECK_S
        self._entries = self._fixed + (read_keys(path) if path else ())

    @property
    def is_required(self) -> bool:
        """Whether requests need a key."""
        return self._path is not None or bool(self._fixed)

    def authenticate(self, token: str | None) -> KeyEntry:
        """Return the key's entry. Raises AuthenticationError where it is missing or unknown."""
        self._reload_if_changed()
        if not token:
            raise AuthenticationError(
                "No API key was sent; send it as `Authorization: Bearer KEY`."
            )
        digest = hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
        found = None
        for entry in self._entries:  # all of them, so that the time tells nothing
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        if found is None:
            raise AuthenticationError("The API key is not known.")
        return found

    def admit(self, entry: KeyEntry) -> KeyLease:
        """Count a request. Raises RateLimitError where a limit of the key is used up."""
        usage = self._usage.setdefault(entry.name, KeyUsage())
        now_s = self._clock()
        usage.forget_old(now_s)
        refusal = self._refusal(entry, usage, now_s)
        if refusal is not None:
            usage.num_refused += 1
            raise refusal
        usage.num_in_flight += 1
        usage.num_requests += 1
        usage.requests.append(now_s)
        return KeyLease(entry, usage, self._clock)

    def usage(self) -> dict[str, KeyUsage]:
        """Return name → use since the start, on this replica."""
        return self._usage

    def _share(self, limit: int) -> int:
        return max(1, limit // self._num_shares)

    def _refusal(self, entry: KeyEntry, usage: KeyUsage, now_s: float) -> RateLimitError | None:
        limit = entry.max_concurrent_requests
        if limit is not None and usage.num_in_flight >= self._share(limit):
            return RateLimitError(
                f"The key's limit of {limit} requests at a time is reached.", retry_after_s=1.0
            )
        limit = entry.requests_per_minute
        if limit is not None and len(usage.requests) >= self._share(limit):
            return RateLimitError(
                f"The key's limit of {limit} requests per minute is reached.",
                retry_after_s=usage.requests[0] + WINDOW_S - now_s,
            )
        limit = entry.tokens_per_minute
        if limit is not None and usage.window_tokens >= self._share(limit):
            return RateLimitError(
                f"The key's limit of {limit} tokens per minute is reached.",
                retry_after_s=usage.tokens[0][0] + WINDOW_S - now_s,
            )
        return None

    def _reload_if_changed(self) -> None:
        now_s = self._clock()
        if self._path is None or now_s < self._next_check_s:
            return
        self._next_check_s = now_s + _RELOAD_CHECK_S
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._entries = self._fixed + read_keys(self._path)
        except ConfigError as error:
            # The keys that were good stay: a slip of the editor locks nobody out.
            _logger.error("keys are not reloaded: %s", error.message)
        else:
            _logger.info("%d keys loaded from %s", len(self._entries), self._path.name)


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    """Read a key file. Raises ConfigError that names the file, the entry and the key in error."""
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"auth.keys_file: {path} cannot be read ({error.strerror})", param="auth.keys_file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"auth.keys_file: {path} is not YAML", param="auth.keys_file") from error
    try:
        entries = _KeyFile.model_validate(content).keys
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"auth.keys_file: {path.name}: {place or 'the file'}: {first['msg']}",
            param="auth.keys_file",
        ) from error
    names = [entry.name for entry in entries]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise ConfigError(
            f"auth.keys_file: {path.name}: two keys are named {doubled}", param="auth.keys_file"
        )
    return entries


def _keys_of_environment(env: Mapping[str, str]) -> tuple[KeyEntry, ...]:
    """Return the plain keys of XERAY_API_KEYS, which may use the models and nothing else."""
    texts = [text.strip() for text in env.get(API_KEYS.name, "").split(",")]
    return tuple(
        KeyEntry(name=f"env-{number}", sha256=hashlib.sha256(text.encode()).hexdigest())
        for number, text in enumerate((text for text in texts if text), start=1)
    )


def _stamp(path: Path | None) -> tuple[int, int] | None:
    """Return what changes when the file does; None where it is not there."""
    try:
        state = path.stat() if path else None
    except OSError:
        return None
    return (state.st_mtime_ns, state.st_size) if state else None
