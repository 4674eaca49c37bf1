import json
import re

import pytest

from serve_app.cli.main import main
from serve_app.doctor.knowledge import faults, guide_claims, search_faults

REQUIRED_GUIDES = (
    "5.8 TFLOPS",
    "Infinity Cache",
    "ipex.optim.AdamW",
    'torch.xpu.stream("default")',
    'return_tensors="xpu"',
    "cuda_data_dir",
    "compatible mode",
    "Vulkan",
    "intel.com/gpu",
    "lsmod | grep intel_gpu",
    "intel-level-zero-gpu",
    "31.0.101.4091",
    "--worker-class",
    "cpupower",
    "OMP_NUM_THREADS makes tokenisation",
    "OMP_NUM_THREADS=1",
    "PCIe 5.0",
    "75 %",
    "torch.load",
)


def test_each_row_cites_a_source_and_says_what_to_do():
    for row in (*faults(), *guide_claims()):
        assert row.sources, row.id
        assert all(re.match(r"https://[\w.-]+/\S*$", source) for source in row.sources), row.id
    assert all(len(fault.fix) > 20 and len(fault.cause) > 20 for fault in faults())
    assert {claim.verdict for claim in guide_claims()} <= {
        "true",
        "outdated",
        "wrong",
        "misleading",
    }


def test_ids_are_unique():
    ids = [row.id for row in (*faults(), *guide_claims())]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("phrase", REQUIRED_GUIDES)
def test_the_widely_copied_claims_are_there(phrase):
    assert any(phrase in claim.claim for claim in guide_claims())


@pytest.mark.parametrize(
    ("question", "fault_id"),
    [
        ("CL_INVALID_MEM_OBJECT", "cl-invalid-mem-object"),
        ("RuntimeError: Torch not compiled with XPU enabled", "xpu-not-available"),
        ("XPU not available", "xpu-not-available"),
        ("driver rollback", "driver-rollback"),
        ("Above 4G", "above-4g-decoding"),
        ("missing module", "missing-kernel-module"),
        ("results vary from run to run", "results-vary"),
        ("slow first request", "slow-first-request"),
        ("out of memory on shared memory", "shared-memory-oom"),
        ("silent fallback to the CPU", "silent-cpu-fallback"),
        ("[drm] Engine reset: engine_class=ccs", "engine-reset"),
        ("wrong torch build", "wrong-torch-build"),
        ("engine-reset", "engine-reset"),
        ("the engine made no progress for 3.2 s", "busy-processor"),
    ],
)
def test_a_symptom_finds_its_fault_first(question, fault_id):
    assert search_faults(question)[0].id == fault_id


def test_a_stable_id_finds_only_its_fault():
    assert [fault.id for fault in search_faults("render-group")] == ["render-group"]


def test_an_unknown_symptom_is_an_error_that_names_the_list(capsys):
    assert search_faults("zzz qqq") == []
    assert main(["doctor", "explain", "zzz"]) == 1
    assert "xeray doctor explain" in capsys.readouterr().err


def test_explain_prints_cause_fix_and_source(capsys):
    assert main(["doctor", "explain", "CL_INVALID_MEM_OBJECT"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("CL_INVALID_MEM_OBJECT (-38)  [cl-invalid-mem-object]")
    for word in ("symptom", "cause", "fix", "source"):
        assert f"\n  {word}" in out


def test_explain_guides_as_json_has_every_row(capsys):
    assert main(["doctor", "explain", "guides", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == [claim.id for claim in guide_claims()]


def test_explain_alone_lists_all_ids(capsys):
    assert main(["doctor", "explain"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        fault.id for fault in faults()
    ]
