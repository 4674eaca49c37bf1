"""A decode step as one call gives the bits of one that is called layer by layer."""

from __future__ import annotations

import pytest
import torch

from serve_app.models.cpu_step import CpuDecodeStep
from serve_app.models.kernels.shown import ShownOperators
from serve_app.models.loading.loader import load_model

FAMILIES = ("llama", "qwen2", "qwen3")  # plain, with biases, with norms of queries and keys


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path, build_model):
    sizes = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
    build_model(request.param, **sizes).save_pretrained(tmp_path)
    return tmp_path


def loaded(folder, **options):
    network = load_model(
        folder, device="cpu", dtype="bfloat16", weight_format="int4", **options
    ).network
    if not network._max_step_rows:
        pytest.skip("no compiler here, or a dense copy is faster")
    return network


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_has_the_bits_of_layer_by_layer(folder, batch_invariant, paged_runner, prompt, monkeypatch):
    network = loaded(folder, batch_invariant=batch_invariant)
    steps = []
    run = CpuDecodeStep.run

    def counted(self, x, *args):
        steps.append(len(x))
        return run(self, x, *args)

    monkeypatch.setattr(CpuDecodeStep, "run", counted)
    sizes = [size for size in (1, 2, 7, 32) if size <= network._max_step_rows]
    results = []
    for is_on in (True, False):
        monkeypatch.setattr(CpuDecodeStep, "is_on", is_on)
        runner = paged_runner(
            network, num_blocks=600, batch_invariant=batch_invariant, poison=float("nan")
        )
        for number in range(max(sizes)):
            runner.prefill(str(number), prompt(3 + 6 * number, seed=number))
        for size in sizes:
            rows = [(str(number), 5 + number) for number in range(size)]
            results.append(torch.stack(list(runner.step(rows).values())))
    assert steps == sizes
    for one, layer_by_layer in zip(results[: len(sizes)], results[len(sizes) :], strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, layer_by_layer)


def test_is_made_anew_for_another_cache_or_number_of_threads(folder, paged_runner, prompt):
    network = loaded(folder)
    before = torch.get_num_threads()
    expected = None
    try:
        for num_threads in (1, 2, 2):
            torch.set_num_threads(num_threads)
            runner = paged_runner(network)
            runner.prefill("a", prompt(20))
            logits = runner.step([("a", 5)])["a"]
            assert expected is None or torch.equal(logits, expected)
            expected = logits
            assert network._step.fits(runner.cache)
    finally:
        torch.set_num_threads(before)


def test_threads_that_come_late_to_the_team_change_nothing(folder, paged_runner, prompt):
    """More of them than cores: some run a stage only when the others are stages further."""
    network = loaded(folder)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 7):
            torch.set_num_threads(num_threads)
            runner = paged_runner(network, num_blocks=400)
            for number in range(9):
                runner.prefill(str(number), prompt(20 + 9 * number, seed=number))
            rows = [(str(number), 5 + number) for number in range(9)]
            results.append([torch.stack(list(runner.step(rows).values())) for _ in range(25)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, team) for one, team in zip(*results, strict=True))


def test_more_rows_than_it_takes_go_layer_by_layer(folder, paged_runner, prompt):
    network = loaded(folder)
    count = network._max_step_rows + 1
    runner = paged_runner(network, num_blocks=200)
    for number in range(count):
        runner.prefill(str(number), prompt(4, seed=number))
    logits = runner.step([(str(number), 5) for number in range(count)])
    assert network._step is None
    assert all(row.isfinite().all() for row in logits.values())


def test_a_profile_sees_each_operator(folder, paged_runner, prompt):
    network = loaded(folder)
    runner = paged_runner(network)
    runner.prefill("a", prompt(20))
    shown = ShownOperators("xeray::")
    shown.show()
    try:
        with torch.profiler.profile(acc_events=True) as profile:
            runner.step([("a", 5)])
    finally:
        shown.hide()
    names = [event.name for event in profile.events()]
    assert names.count("xeray::packed_linear") >= 4 * network.config.num_layers
    assert CpuDecodeStep.is_on


def test_it_can_be_switched_off(folder, monkeypatch):
    monkeypatch.setattr("serve_app.models.cpu_step.disabled_kernels", lambda: {"cpu_step"})
    network = load_model(folder, device="cpu", dtype="bfloat16", weight_format="int4").network
    assert network._max_step_rows == 0
