from __future__ import annotations

import pytest

from serve_app.bench.workloads import WORKLOADS, WorkloadOptions, make_workload
from serve_app.core.errors import ConfigError


@pytest.mark.parametrize("name", WORKLOADS)
def test_same_seed_same_requests(name: str) -> None:
    options = WorkloadOptions(num_requests=12, seed=5)

    assert make_workload(name, options) == make_workload(name, options)
    assert make_workload(name, options) != make_workload(name, WorkloadOptions(12, seed=6))
    assert len(make_workload(name, options)) == 12


def test_fixed_has_exactly_the_sizes_asked_for_and_no_common_prefix() -> None:
    specs = make_workload("fixed", WorkloadOptions(8, prompt_tokens=128, output_tokens=5))

    assert {len(spec.body["prompt"]) for spec in specs} == {128}
    assert {spec.body["max_tokens"] for spec in specs} == {5}
    assert len({tuple(spec.body["prompt"][:16]) for spec in specs}) == 8


def test_shared_prefix_has_four_prefixes() -> None:
    specs = make_workload("shared_prefix", WorkloadOptions(16, prompt_tokens=64))

    assert len({tuple(spec.body["prompt"][:48]) for spec in specs}) == 4
    assert len({tuple(spec.body["prompt"]) for spec in specs}) == 16


def test_long_prompt_is_eight_times_as_long() -> None:
    (spec,) = make_workload("long_prompt", WorkloadOptions(1, prompt_tokens=32, output_tokens=64))

    assert len(spec.body["prompt"]) == 256
    assert spec.body["max_tokens"] == 16


def test_mixed_has_every_kind() -> None:
    kinds = [spec.kind for spec in make_workload("mixed", WorkloadOptions(16))]

    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "chat": 8,
        "long_prompt": 4,
        "shared_prefix": 4,
    }


def test_unknown_workload_names_the_known() -> None:
    with pytest.raises(ConfigError, match="shared_prefix"):
        make_workload("martian", WorkloadOptions())
