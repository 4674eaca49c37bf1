import json

import pytest
import torch

from serve_app.cli import selftest
from serve_app.cli.main import main
from serve_app.core.errors import ConfigError
from serve_app.models.kernels.verify import KernelCheck


@pytest.fixture
def _is_quick(monkeypatch):
    """Leave out the parts that load a model, and the timing."""
    monkeypatch.setattr(selftest, "copy_bandwidth", lambda device: 5e9)
    monkeypatch.setattr(
        selftest, "_embedded_model_check", lambda device: selftest.Check("embedded", True, "")
    )


@pytest.mark.usefixtures("_is_quick")
def test_passes_on_the_cpu_and_writes_the_report(tmp_path, capsys):
    assert main(["selftest", "--device", "cpu", "--output", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report/selftest.json").read_text())
    assert report["is_ok"]
    assert report["device"] == "cpu"
    assert report["versions"]["torch"] == torch.__version__
    names = {check["name"] for check in report["checks"]}
    kernels = {"norm", "activation", "rope", "paged_decode", "gemv", "int4"}
    assert {f"kernel {name}" for name in kernels} <= names
    assert {"sampler", "random model", "embedded"} <= names
    text = (tmp_path / "report/selftest.txt").read_text()
    assert "copy 5.0 GB/s" in text
    assert "0 failed" in text
    assert "0 failed" in capsys.readouterr().out


@pytest.mark.usefixtures("_is_quick")
def test_a_wrong_kernel_and_a_crash_fail(tmp_path, monkeypatch, capsys):
    wrong = KernelCheck("norm", "1 row", True, float("nan"), 1e-2)
    monkeypatch.setattr(selftest, "check_kernels", lambda device, dtype: [wrong])

    def crash(device):
        raise RuntimeError("no such device function")

    monkeypatch.setattr(selftest, "_random_model_check", crash)
    assert main(["selftest", "--device", "cpu", "--output", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAILED kernel norm: 1 row") for line in lines)
    assert "FAILED random model: RuntimeError: no such device function" in lines
    assert not json.loads((tmp_path / "selftest.json").read_text())["is_ok"]


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    report = selftest.Report("cpu", "a CPU", 1e9, {})
    with pytest.raises(ConfigError, match="--output"):
        selftest._write(report, tmp_path / "file")
