"""The autoscaling policy `engine_load`: waiting tokens, KV pressure and TTFT against targets.

Ray Serve pickles this module by value into its controller: it imports the standard library only.
Serve applies its own delays and bounds to what the policy asks for, and it alone counts requests,
also those that wait for a deployment that has no replica.
"""

import math
from typing import Any

_TOLERANCE = 0.1
"""A load within this share of its target changes nothing."""
_DOWN_SHARE = 0.7
"""Fewer replicas are asked for only if they would then stand below this share of every target."""


class EngineLoadPolicy:
    """Asks for as many replicas as bring the worst of three measures back to its target.

    waiting_tokens: prompt tokens per replica that wait for their first token.
    kv_usage: mean share (0–1) of KV blocks in use.
    ttft_p95_s: seconds; together with waiting requests it asks for one replica more at a time,
        for a TTFT that is long for another reason is not mended by many.
    target_ongoing_requests: requests per replica, the measure where replicas tell nothing yet.
    """

    def __init__(
        self,
        waiting_tokens: float = 2048,
        kv_usage: float = 0.8,
        ttft_p95_s: float = 1.0,
        target_ongoing_requests: float = 8.0,
    ) -> None:
        self.waiting_tokens = waiting_tokens
        self.kv_usage = kv_usage
        self.ttft_p95_s = ttft_p95_s
        self.target_ongoing_requests = target_ongoing_requests

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Return the number of replicas wanted and the unchanged state (Serve's own signature)."""
        current = context.target_num_replicas
        num_requests = float(context.total_num_requests)
        state = dict(context.policy_state or {})
        if current == 0:
            return float(math.ceil(num_requests / self.target_ongoing_requests)), state
        metrics = context.aggregated_metrics or {}
        if num_requests <= 0 and _total(metrics, "num_streams") <= 0:
            return 0.0, state  # Serve's bounds make this min_replicas
        wanted = self._wanted(metrics, current, num_requests)
        return float(max(1, wanted)), state

    def _wanted(self, metrics: dict[str, Any], current: int, num_requests: float) -> int:
        waiting = _total(metrics, "num_waiting_tokens")
        kv_held = _total(metrics, "kv_usage")  # in replicas' worth of cache
        ttft_s = _largest(metrics, "ttft_p95_s")
        load = max(
            waiting / self.waiting_tokens,
            kv_held / self.kv_usage,
            num_requests / self.target_ongoing_requests if not metrics else 0.0,
        )
        if load > current * (1 + _TOLERANCE):
            return math.ceil(load)
        if ttft_s > self.ttft_p95_s and waiting > 0:
            return current + 1
        is_calm = ttft_s <= self.ttft_p95_s * _DOWN_SHARE
        fewer = max(1, math.ceil(load / _DOWN_SHARE), math.ceil(self._by_requests(num_requests)))
        return fewer if is_calm and fewer < current else current

    def _by_requests(self, num_requests: float) -> float:
        return num_requests / self.target_ongoing_requests


def _values(metrics: dict[str, Any], name: str) -> list[float]:
    return [float(value) for value in (metrics.get(name) or {}).values()]


def _total(metrics: dict[str, Any], name: str) -> float:
    return sum(_values(metrics, name))


def _largest(metrics: dict[str, Any], name: str) -> float:
    return max(_values(metrics, name), default=0.0)
