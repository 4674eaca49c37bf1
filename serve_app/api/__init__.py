"""The HTTP surface as a Starlette application over a `Backend`; imports neither torch nor ray."""
