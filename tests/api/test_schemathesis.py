"""The OpenAPI document against the application: no answer that it does not tell, no 5xx."""

import pytest
from hypothesis import HealthCheck, given, settings

from serve_app.api.openapi import OPERATIONS
from serve_app.api.protocol import base

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

openapi_checks = pytest.importorskip("schemathesis.specs.openapi.checks")

_CHECKS = ("status_code_conformance", "content_type_conformance")


@pytest.mark.parametrize(
    ("method", "path"), [(operation.method, operation.path) for operation in OPERATIONS]
)
def test_answers_are_those_of_the_document(
    make_app, method: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_logged_keys", set())  # bounded: hundreds of odd keys would fill it
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app())
    checks = [getattr(openapi_checks, name) for name in _CHECKS]

    @settings(
        max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(case=schema[path][method.upper()].as_strategy())
    def ask(case) -> None:
        answer = case.call()
        assert answer.status_code < 500, answer.text
        # The document gives the JSON of an event's data line, the tool expects the event itself.
        is_json = answer.headers["content-type"][0].startswith("application/json")
        schema_check = [openapi_checks.response_schema_conformance] if is_json else []
        case.validate_response(answer, checks=[*checks, *schema_check])

    ask()
