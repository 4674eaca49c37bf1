"""Pure-ASGI middleware: nothing here buffers an answer or adds a task to a stream."""
