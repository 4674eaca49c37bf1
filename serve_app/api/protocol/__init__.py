"""What clients send and get: pydantic models of every request, answer and stream chunk."""
