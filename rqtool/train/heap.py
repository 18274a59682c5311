"""Memory that the C library keeps after it was freed: given back to the system when a long run has
gathered much of it.

torch asks for aligned blocks, and glibc (before 2.38) does not find a freed block of just that size
again (sourceware.org, bug 14581). Whether holes then pile up depends on the order of requests:
fine-tuning was seen to gain up to 70 MB a step, until the system ran out. Giving everything back in
each step would cost more than half of the step's time in page faults; giving it back when it has
grown costs nothing.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

GROWTH = 1 << 30  # bytes


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
    except (OSError, ValueError, AttributeError):
        return 0


def give_back() -> None:
    """Hand freed memory back to the system, where the C library can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (
        OSError,
        AttributeError,
        TypeError,
    ):  # another C library, or a system without a process-wide namespace
        pass


class Watched:
    """A process that does the same work in each step, so that what it gains after the first one is
    freed memory."""

    def __init__(self) -> None:
        self.base = 0

    def step_done(self) -> None:
        """To be called after each step."""
        now = resident()
        if self.base == 0:
            self.base = now
        elif now > self.base + GROWTH:
            give_back()
            self.base = 0  # measured after the next step: what remains then is needed
