from __future__ import annotations

import pytest
from pydantic import ValidationError

from serve_app.config.sections_reasoning import ReasoningSection


def test_efforts_have_budgets() -> None:
    section = ReasoningSection(minimal=10, low=100)
    efforts = ("none", "minimal", "low", "medium", "high", "xhigh")
    assert [section.budget(effort) for effort in efforts] == [0, 10, 100, 8192, None, None]


@pytest.mark.parametrize("values", [{"low": 9000}, {"medium": None, "high": 100}, {"minimal": -1}])
def test_more_effort_never_allows_less(values: dict[str, int | None]) -> None:
    with pytest.raises(ValidationError):
        ReasoningSection(**values)
