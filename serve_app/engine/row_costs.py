"""What further rows of a decode step cost, and so which drafts are worth theirs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

_UNMEASURED = {1: 1.0, 65: 7.4}
"""A tenth of a lone row's step for each row more, as on a CPU with a small model."""

_LOWEST = 0.02


class RowCosts:
    """Times of decode steps by their number of rows, interpolated between those measured.

    Args:
        seconds: rows → seconds of a step; empty for an estimate.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        known = sorted((seconds if len(seconds) > 1 else _UNMEASURED).items())
        self._rows = [rows for rows, _ in known]
        # More rows never take less: what a busy machine shows else is noise.
        self._seconds = [min(time for _, time in known[i:]) for i in range(len(known))]

    def step_s(self, num_rows: int) -> float:
        """Seconds of a step; beyond the rows measured as steep as between the last two."""
        right = min(max(bisect_left(self._rows, num_rows), 1), len(self._rows) - 1)
        rows, seconds = self._rows[right - 1 : right + 1], self._seconds[right - 1 : right + 1]
        slope = (seconds[1] - seconds[0]) / (rows[1] - rows[0])
        return seconds[0] + slope * (num_rows - rows[0])

    def break_even(self, num_decodes: int, num_drafted: int) -> float:
        """Probability from which on a drafted token is worth its row beside `num_decodes` others.

        A token that holds saves a row of a later step; without drafts that costs the step's time
        over its rows. In a small batch, which waits for the weights, this is little; where rows
        are computed one after the other it is 1, and nothing is worth drafting.
        """
        alone = self.step_s(num_decodes)
        per_row = (self.step_s(num_decodes + num_drafted) - alone) / num_drafted
        return max(_LOWEST, per_row * num_decodes / alone)
