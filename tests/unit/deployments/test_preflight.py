import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve_app.config.schema import AppConfig
from serve_app.core.errors import ConfigError
from serve_app.deployments import preflight
from serve_app.deployments.ray_private import Driver

TWO_CARDS = AppConfig.model_validate(
    {"model_replica": {"pool": "arc", "num_replicas": 2}, "preprocessor": {"xeon_cores": 1}}
)


def test_the_line_has_the_exact_command() -> None:
    with pytest.raises(ConfigError) as failure:
        preflight.check_resources(
            {"CPU": 1.3, "arc_gpu": 2, "xeon_cores": 1},
            [{"CPU": 4.0, "xeon_cores": 1.0}],
            {"arc_gpu": 2, "xeon_cores": 1},
        )

    assert failure.value.message == (
        "this Ray lacks what the config asks for: 2 arc_gpu (declared: 0); start Ray with:"
        """ ray start --head --resources='{"arc_gpu": 2, "xeon_cores": 1}'"""
    )


def test_cpus_and_gpus_have_options_of_their_own() -> None:
    with pytest.raises(ConfigError) as failure:
        preflight.check_resources({"CPU": 2.3, "GPU": 2}, [{"CPU": 2.0}], {})

    assert failure.value.message.endswith("ray start --head --num-cpus=3 --num-gpus=2")


def test_resources_of_several_nodes_add_up() -> None:
    preflight.check_resources({"arc_gpu": 2}, [{"arc_gpu": 1.0}, {"arc_gpu": 1.0}], {})


def test_the_command_declares_what_this_host_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XERAY_SIMULATED_ARC_CARDS", "2")
    monkeypatch.setenv("XERAY_NUM_CORES", "8")
    scaled = AppConfig.model_validate(
        {"model_replica": {"pool": "arc", "autoscaling": {"max_replicas": 4}}}
    )

    assert preflight.useful_resources(scaled) == {"arc_gpu": 2, "xeon_cores": 1}


def test_a_replica_needs_its_cards_on_one_node() -> None:
    settings = AppConfig.model_validate({"model_replica": {"pool": "arc", "num_cards": 2}})
    one_each = [{"arc_gpu": 1.0}, {"arc_gpu": 1.0}]

    with pytest.raises(ConfigError, match="2 cards on one node asked for, but the largest"):
        preflight.check_cards_per_node(settings, one_each)
    preflight.check_cards_per_node(settings, [{"arc_gpu": 2.0}])


def test_more_cards_declared_than_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XERAY_SIMULATED_ARC_CARDS", "1")

    preflight.check_declared_cards({"arc_gpu": 1.0})
    with pytest.raises(ConfigError, match="Ray declares 2 arc_gpu, but this host has 1"):
        preflight.check_declared_cards({"arc_gpu": 2.0})


SERVE_RUN = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.{handler})
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["SIG_DFL"])
def waiting(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process that looks like `serve run FILE`, the only driver of its Ray."""
    script = tmp_path / "serve"
    script.write_text(SERVE_RUN.format(handler=request.param))
    config = tmp_path / "c.yaml"
    config.write_text(
        "applications:\n- {import_path: 'serve_app:build_app', args: {engine: {max_num_seqs: 3}}}\n"
    )
    with (tmp_path / "stderr").open("a") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(script), "run", "c.yaml"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    assert process.stdout is not None
    process.stdout.readline()
    monkeypatch.setattr(preflight, "_serve_run_pids", lambda: [process.pid])
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
    ("waiting", "number"),
    [("SIG_DFL", signal.SIGHUP), ("SIG_IGN", signal.SIGTERM)],  # the second is under nohup
    indirect=["waiting"],
)
def test_the_waiting_serve_run_gets_the_line_and_ends(
    waiting: Any, tmp_path: Path, number: signal.Signals
) -> None:
    found = preflight.fail_serve_run(
        "no\ncards", lambda args: args == {"engine": {"max_num_seqs": 3}}
    )

    assert found
    assert waiting.wait(10) == -number
    assert (tmp_path / "stderr").read_text() == "xeray: no cards\n"


def test_a_serve_run_of_something_else_is_left_alone(waiting: Any, tmp_path: Path) -> None:
    assert not preflight.fail_serve_run("no cards", lambda args: args == {})

    assert waiting.poll() is None
    assert (tmp_path / "stderr").read_text() == ""


def test_other_drivers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drivers = [Driver("10.0.0.1", os.getpid(), "pytest"), Driver("10.0.0.2", 1, "serve run x")]
    monkeypatch.setattr(preflight, "live_drivers", lambda: drivers)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.1")

    assert preflight._serve_run_pids() == [os.getpid()]
    assert not preflight.fail_serve_run("no cards", lambda args: True)
