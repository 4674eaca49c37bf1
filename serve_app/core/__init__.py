"""Types, errors and the clock that every other package shares; standard library only."""
