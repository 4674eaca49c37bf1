import pytest

from serve_app.core import errors


def _leaf_classes(cls=errors.XeRayError):
    for sub in cls.__subclasses__():
        yield sub
        yield from _leaf_classes(sub)


# ConfigErrors are for start-up: they never cross a process as the outcome of a request.
_CROSSING = sorted(
    (
        cls
        for cls in set(_leaf_classes())
        if not issubclass(cls, errors.ConfigError) and cls.__module__ == errors.__name__
    ),
    key=lambda cls: cls.__name__,
)


@pytest.mark.parametrize("cls", _CROSSING)
def test_an_error_survives_the_trip_across_a_process_boundary(cls):
    info = cls("went wrong").info()
    rebuilt = errors.error_from_info(info)
    assert type(rebuilt) is cls
    assert rebuilt.info() == info


def test_the_code_of_an_overload_survives_the_trip():
    info = errors.OverloadedError("loading", code="model_loading", retry_after_s=3).info()
    rebuilt = errors.error_from_info(info)
    assert (rebuilt.code, rebuilt.retry_after_s, rebuilt.info().is_retryable) == (
        "model_loading",
        3,
        True,
    )


def test_an_unknown_error_becomes_an_engine_error():
    info = errors.ErrorInfo(status=599, type="strange", code="strange", message="?")
    assert isinstance(errors.error_from_info(info), errors.EngineError)


def test_every_client_error_is_a_4xx_and_never_retried():
    for cls in _leaf_classes(errors.ClientError):
        assert 400 <= cls.status < 500
        assert not cls.is_retryable
