from __future__ import annotations

import pytest
from hypothesis import settings

from serve_app.config.model_source import resolve_model
from serve_app.config.schema import ModelSection
from serve_app.text.tokenizer import Tokenizer, load_tokenizer

settings.register_profile("shared_machine", deadline=None)
settings.load_profile("shared_machine")


@pytest.fixture(scope="session")
def embedded() -> Tokenizer:
    return load_tokenizer(resolve_model(ModelSection()))
