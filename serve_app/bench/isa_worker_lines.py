"""Lines by which a run of `xeray bench isa` tells its phases and result, beside oneDNN's log."""

PHASE = "xeray_phase "
RESULT = "xeray_result "
