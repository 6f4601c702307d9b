"""Ctrl-C where Python would ignore it."""

import _thread
import sys
import threading
from typing import Any


def never_swallow_interrupts() -> None:
    """Sees to it that Ctrl-C ends a program also while a callback runs whose exceptions Python only prints.

    A collection of garbage calls such callbacks (JAX has one), and so does the end of an object. There a
    `KeyboardInterrupt` has no effect; here it is raised anew in the main thread, until it arrives where it counts.
    """
    before = sys.unraisablehook

    def raise_anew(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        # From another thread, as what is raised here is ignored too; later, where that already came while this runs.
        seconds = 0.05
        while True:
            try:
                threading.Timer(seconds, _thread.interrupt_main).start()
                return
            except KeyboardInterrupt:
                seconds *= 2

    sys.unraisablehook = raise_anew
