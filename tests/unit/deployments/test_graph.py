import subprocess
import sys
from typing import Any

import pytest

from serve_app.config.schema import AppConfig
from serve_app.core.errors import ClientError, ConfigError, EngineError, OverloadedError
from serve_app.deployments import graph
from serve_app.deployments.graph import ServeArgs, build_app
from serve_app.deployments.ray_errors import to_xeray_error


def test_serve_finds_the_schema_of_the_args() -> None:
    # What Ray does with the builder: the annotation must be the class, not its name.
    assert build_app.__annotations__["args"] is ServeArgs
    assert issubclass(ServeArgs, AppConfig)


def test_bad_args_are_one_line_and_tell_the_waiting_serve_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(
        graph, "fail_serve_run", lambda message, is_ours: told.append((message, is_ours))
    )
    args = {"engin": {}}

    with pytest.raises(ConfigError, match=r"args\.engin: unknown key; did you mean 'engine'\?"):
        ServeArgs.model_validate(args)

    ((message, is_ours),) = told
    assert message == "args.engin: unknown key; did you mean 'engine'?"
    assert is_ours(args)
    assert not is_ours({})


def test_the_graph_is_built_without_a_cluster() -> None:
    app = build_app(ServeArgs.model_validate({"ingress": {"num_replicas": 3}}))

    ingress = app._bound_deployment
    assert ingress.name == "Ingress"
    assert ingress.num_replicas == 3


def test_neither_torch_nor_transformers_is_imported() -> None:
    script = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "import serve_app.deployments.graph\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "expected", "code", "is_retryable"),
    [
        (ClientError("bad"), ClientError, "invalid_value", False),
        ("ActorDiedError", EngineError, "internal_error", True),
        ("ActorUnavailableError", EngineError, "internal_error", True),
        ("TaskCancelledError", EngineError, "internal_error", True),
        (ConnectionResetError(), EngineError, "internal_error", True),
        (KeyError("a bug"), EngineError, "internal_error", False),
    ],
)
def test_rays_exceptions_become_errors_of_ours(
    error: Any, expected: type[Exception], code: str, is_retryable: bool
) -> None:
    import ray.exceptions

    if isinstance(error, str):
        cls = getattr(ray.exceptions, error)
        error = cls("gone", None) if error == "ActorUnavailableError" else cls()

    result = to_xeray_error(error, "model replica")

    assert type(result) is expected
    assert (result.code, result.is_retryable) == (code, is_retryable)
    assert "a bug" not in result.message, "what a client sees names no internals"


def test_serves_back_pressure_is_a_full_queue() -> None:
    from ray.serve.exceptions import BackPressureError

    result = to_xeray_error(
        BackPressureError(num_queued_requests=9, max_queued_requests=8), "model replica"
    )

    assert isinstance(result, OverloadedError)
    assert result.code == "queue_full"
