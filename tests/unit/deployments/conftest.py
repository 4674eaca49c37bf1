"""Ray is imported here first: it warns of its own use of pydantic, and a warning is an error."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
