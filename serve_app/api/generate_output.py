"""The plain form of POST /generate, as a stream or as one answer."""

from __future__ import annotations

from serve_app.api.jobs import Job, Tally
from serve_app.api.sse import event, json_bytes, json_string
from serve_app.core.requests import GenerateChunk


class GenerateOutput:
    """Order of a stream: text events, then one with the finish reason and the usage."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tally = Tally(job)
        self._text: list[str] = []
        self._finish_reason = "stop"
        self._stop_reason: str | int | None = None

    @property
    def tally(self) -> Tally:
        """The token counts so far."""
        return self._tally

    def events(self, choice: int, chunk: GenerateChunk) -> bytes:
        """Return the event for a chunk's text; the finish follows with the usage."""
        self._note(choice, chunk)
        return b'data: {"text":%b}\n\n' % json_string(chunk.text) if chunk.text else b""

    def closing_events(self) -> bytes:
        """Return the event with the finish reason and the usage."""
        return event(
            {
                "text": "",
                "finish_reason": self._finish_reason,
                "stop_reason": self._stop_reason,
                "usage": self._tally.usage().model_dump(),
            }
        )

    def add(self, choice: int, chunk: GenerateChunk) -> None:
        """Gather a chunk."""
        self._note(choice, chunk)
        self._text.append(chunk.text)

    def answer(self) -> bytes:
        """Return the GenerateAnswer."""
        return json_bytes(
            {
                "text": "".join(self._text),
                "model": self._job.card.id,
                "finish_reason": self._finish_reason,
                "stop_reason": self._stop_reason,
                "usage": self._tally.usage().model_dump(),
            }
        )

    def _note(self, choice: int, chunk: GenerateChunk) -> None:
        self._tally.add(choice, chunk)
        if chunk.finish_reason is not None:
            self._finish_reason = chunk.finish_reason
            self._stop_reason = chunk.stop_reason
