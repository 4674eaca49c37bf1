from __future__ import annotations

import sys
from pathlib import Path

import pytest

from serve_app.bench.load import RequestRecord
from serve_app.bench.peers import command
from serve_app.bench.peers.contestant import (
    Figures,
    RunnerContestant,
    _token_times,
    figures_of,
    runner_script,
)
from serve_app.bench.peers.environment import PeerEnvironment, PeerPackage
from serve_app.bench.peers.measure import peers_table, run_rounds, summarise_rounds
from serve_app.bench.peers.runners.loop import peak_bytes
from serve_app.bench.rounds import RoundOptions
from serve_app.bench.workloads import WorkloadOptions, make_workload
from serve_app.core.errors import ConfigError, EngineError

SPECS = make_workload("fixed", WorkloadOptions(num_requests=3, prompt_tokens=5))
FAKE = """
import sys
sys.path.insert(0, {folder!r})
from loop import serve

def start(options):
    print("noise of a library on stdout")
    if options.settings.get("broken"):
        raise ValueError("cannot\\nload")
    def run(prompts, num_output):
        if options.settings.get("dies"):
            import os, signal
            os.kill(os.getpid(), signal.SIGSEGV)
        return [[0.5 + i / 10 + place for place in range(num_output)] for i in range(len(prompts))]
    return {{"version": "1"}}, run

serve(start)
"""
OPTIONS = {"model": "m", "num_threads": 1, "max_num_seqs": 3, "max_model_len": 16}


@pytest.fixture
def fake_runner(tmp_path: Path):
    folder = runner_script("xeray").parent
    script = tmp_path / "run_fake.py"
    script.write_text(FAKE.format(folder=str(folder)))
    started: list[RunnerContestant] = []

    def start(**settings: object) -> RunnerContestant:
        options = {**OPTIONS, "settings": settings}
        runner = RunnerContestant("fake", Path(sys.executable), script, options)
        started.append(runner)
        return runner

    yield start
    for runner in started:
        runner.close()


def test_a_runner_answers_batches_until_its_input_ends(fake_runner):
    runner = fake_runner()
    assert runner.facts["version"] == "1"
    assert runner.facts["startup_s"] >= 0
    for num_output in (4, 2):
        figures = runner.run(SPECS, num_output)
        # The last of three sequences has its first token at 0.7 s.
        assert figures.prefill == pytest.approx(15 / 0.7)
        assert figures.ttft_s == pytest.approx(0.6)
        assert figures.peak_bytes > 1 << 20
    runner.close()
    assert runner._process.returncode == 0


def test_a_runner_that_cannot_load_says_why_in_one_line(fake_runner):
    with pytest.raises(EngineError, match="fake: ValueError: cannot load"):
        fake_runner(broken=True)


def test_a_runner_that_dies_is_told_by_its_signal(fake_runner):
    runner = fake_runner(dies=True)
    with pytest.raises(EngineError, match="ended by SIGSEGV"):
        runner.run(SPECS, 4)


def test_a_runner_without_its_library_is_told_by_its_last_line(tmp_path):
    script = tmp_path / "run_none.py"
    script.write_text("import a_module_that_is_not_there\n")
    with pytest.raises(EngineError, match="a_module_that_is_not_there"):
        RunnerContestant("none", Path(sys.executable), script, {**OPTIONS, "settings": {}})


def test_decode_counts_what_comes_after_the_last_first_token():
    figures = figures_of([[1.0, 2.0, 3.0, 5.0], [2.0, 3.0, 4.0, 5.0]], num_prompt=20, peak_bytes=7)
    assert figures == Figures(decode=5 / 3, prefill=10.0, whole=8 / 5, ttft_s=1.5, peak_bytes=7)


def test_tokens_of_a_chunk_lie_between_the_chunk_before_and_it():
    record = RequestRecord("fixed", 0.0, ttft_s=1.0, e2el_s=9.0, num_output_tokens=7)
    record.itls_s, record.chunk_chars = [4.0, 1.0], [3, 6, 12]
    # Two of six tokens in the slow four seconds, four in the last one.
    assert _token_times(record) == pytest.approx([1.0, 3.0, 5.0, 5.25, 5.5, 5.75, 6.0])


def test_tokens_of_a_single_chunk_come_with_it():
    record = RequestRecord("fixed", 0.0, ttft_s=1.0, e2el_s=9.0, num_output_tokens=3)
    record.chunk_chars = [5]
    assert _token_times(record) == [1.0, 1.0, 1.0]


def test_tokens_without_text_lie_evenly():
    record = RequestRecord("fixed", 0.0, ttft_s=1.0, e2el_s=4.0, num_output_tokens=4)
    assert _token_times(record) == [1.0, 2.0, 3.0, 4.0]
    assert _token_times(RequestRecord("fixed", 0.0, ttft_s=1.0, num_output_tokens=1)) == [1.0]


class _Scripted:
    """Decodes at `rate`; fails from batch `fails_at` on."""

    def __init__(self, name: str, rate: float, fails_at: int | None = None) -> None:
        self.name, self.facts = name, {}
        self._rate, self._fails_at, self.batches = rate, fails_at, []

    def run(self, specs, num_output):
        self.batches.append((len(specs), num_output))
        if self._fails_at is not None and len(self.batches) > self._fails_at:
            raise EngineError(f"{self.name}: out of memory")
        return Figures(self._rate * len(specs), 100.0, 50.0, 0.25, 1 << 30)

    def close(self) -> None:
        self.batches.append("closed")


def test_rounds_alternate_and_ratios_are_to_ours():
    ours, other = _Scripted("ours", 10.0), _Scripted("other", 25.0)
    lines: list[str] = []
    options = RoundOptions(concurrencies=(1, 4), output_tokens=16, num_rounds=2)
    results = run_rounds([ours, other], options, lines.append)
    assert ours.batches == other.batches == [(4, 8), (1, 16), (4, 16), (1, 16), (4, 16)]
    entries = summarise_rounds(results, "ours")
    assert [(e["contestant"], e["concurrency"]) for e in entries] == [
        ("ours", 1),
        ("other", 1),
        ("ours", 4),
        ("other", 4),
    ]
    assert entries[0]["decode_ratio"] == 1.0
    assert entries[3]["decode_ratio"] == 2.5
    assert entries[3]["decode"] == 100.0
    table = peers_table(entries)
    assert "decode ÷ ours" in table.splitlines()[0]
    assert table.splitlines()[5].split() == (
        ["other", "4", "100.0", "100.0", "100.0", "100.0", "250.0", "1,024.0", "2.50", "1.00"]
    )


def test_one_that_fails_is_left_out_and_the_others_go_on():
    ours, other = _Scripted("ours", 10.0), _Scripted("other", 25.0, fails_at=2)
    lines: list[str] = []
    options = RoundOptions(concurrencies=(1, 2), num_rounds=2)
    results = run_rounds([ours, other], options, lines.append)
    assert sum("other: out of memory; it is left out" in line for line in lines) == 1
    assert len(ours.batches) == 5
    assert [len(results["other"].get(size, [])) for size in (1, 2)] == [1, 0]
    assert [e["contestant"] for e in summarise_rounds(results, "ours")].count("other") == 1


def test_without_ours_there_is_no_ratio():
    figures = {"other": {1: [Figures(1.0, 1.0, 1.0, 1.0, 1)]}}
    (entry,) = summarise_rounds(figures, "ours")
    assert entry["decode_ratio"] is None
    assert peers_table([entry]).splitlines()[2].split()[-1] == "-"


def test_a_missing_peer_is_one_line_and_the_rest_is_measured(monkeypatch, repository):
    ours = _Scripted(command.OURS, 10.0)

    def missing() -> None:
        raise ConfigError("pip install llama-cpp-python\n failed: no compiler")

    monkeypatch.setattr(
        command, "_starts", lambda *_: {command.OURS: lambda: ours, "llama.cpp": missing}
    )
    lines: list[str] = []
    report = command.measure_peers(
        repository / "configs/local.yaml",
        (),
        RoundOptions(concurrencies=(1,), num_rounds=1),
        only=(command.OURS, "llama.cpp"),
        on_line=lines.append,
    )
    assert "llama.cpp is left out: pip install llama-cpp-python failed: no compiler" in lines
    assert [entry["contestant"] for entry in report["peers"]] == [command.OURS]
    assert ours.batches[-1] == "closed"
    with pytest.raises(ConfigError, match="nobody to measure"):
        command.measure_peers(
            repository / "configs/local.yaml",
            (),
            RoundOptions(),
            only=("llama.cpp",),
            on_line=lines.append,
        )


def test_a_package_that_is_there_is_not_installed_again(tmp_path):
    environment = PeerEnvironment(tmp_path / "venv")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    environment.python.symlink_to(sys.executable)
    environment.provide(PeerPackage("json-that-no-index-has", "json"))


def test_a_package_that_cannot_be_installed_says_so(tmp_path):
    environment = PeerEnvironment(tmp_path / "venv")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    environment.python.write_text("#!/bin/sh\necho 'ERROR: no such thing'; exit 1\n")
    environment.python.chmod(0o755)
    with pytest.raises(ConfigError, match="pip install nothing failed: ERROR: no such thing"):
        environment.provide(PeerPackage("nothing", "a_module_that_is_not_there"))


def test_peak_memory_is_what_the_kernel_says(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t    2048 kB\n")
    assert peak_bytes(status) == 2048 * 1024
    assert peak_bytes(tmp_path / "none") == 0


def test_every_contestant_has_its_runner():
    for name in ("xeray", "llama_cpp", "openvino", "transformers"):
        compile(runner_script(name).read_text(), name, "exec")
    with pytest.raises(ConfigError, match="run_other"):
        runner_script("other")


def test_a_runner_that_does_not_answer_is_ended(tmp_path):
    script = tmp_path / "run_silent.py"
    script.write_text("import time\ntime.sleep(60)\n")
    options = {**OPTIONS, "settings": {}}
    with pytest.raises(EngineError, match=r"silent: no answer within 0\.1 s"):
        RunnerContestant("silent", Path(sys.executable), script, options, timeout_s=0.1)


def test_ctrl_c_keeps_what_was_measured():
    told: list[str] = []

    class Contestant:
        name, facts = "ours", {}

        def run(self, specs, num_output):
            if len(specs) == 2:
                raise KeyboardInterrupt
            return Figures(decode=1.0, prefill=2.0, whole=1.0, ttft_s=0.1, peak_bytes=1)

        def close(self):
            pass

    options = RoundOptions(concurrencies=(3, 1, 2), num_rounds=1, output_tokens=4)
    results = run_rounds([Contestant()], options, told.append)
    assert list(results["ours"]) == [3, 1]
    assert "cut short" in told[-1]
