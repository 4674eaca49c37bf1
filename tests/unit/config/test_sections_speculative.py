from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from serve_app.config.load import validate_args
from serve_app.config.schema import EngineSection
from serve_app.config.sections_speculative import SpeculativeSection
from serve_app.core.errors import ConfigError


def test_drafts_are_off_unless_asked_for() -> None:
    assert not EngineSection().speculative.is_on
    assert not SpeculativeSection.model_validate(yaml.safe_load("{method: off}")).is_on
    assert SpeculativeSection(method="prompt_lookup").is_on


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_ngram": 4, "max_ngram": 3}, "min_ngram (4) is more than max_ngram (3)"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"num_tokens": 65}, "num_tokens"),
        ({"method": "eagle"}, "method"),
        ({"num_token": 3}, "did you mean 'num_tokens'?"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_args({"engine": {"speculative": values}})
    assert "engine.speculative" in caught.value.message
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("kind", ["transformers", "openvino", "ipex"])
def test_engines_without_drafts_are_refused(kind: str) -> None:
    args = {"engine": {"kind": kind, "speculative": {"method": "prompt_lookup"}}}
    with pytest.raises(ConfigError, match=f"speculative.method needs kind: native, not {kind}"):
        validate_args(args)
    args["engine"]["speculative"] = {"method": "off"}
    validate_args(args)


def test_a_clock_drafts_nothing() -> None:
    with pytest.raises(ValidationError, match="excludes fixed_rate_tokens_per_s: set it to off"):
        EngineSection(
            fixed_rate_tokens_per_s=30, speculative=SpeculativeSection(method="prompt_lookup")
        )
