"""``python -m serve_app.hardware.power.guardian JOURNAL``: waits for its parent's end, restores.

Started by `CapGuard`, which has removed the journal where it ended in good order.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from serve_app.hardware.power.guard import restore_left_over


def main() -> None:
    """Wait until the pipe from the parent ends, then put back what the journal tells."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while sys.stdin.buffer.read(1024):
        pass
    restore_left_over(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
