"""Signals that ask a run to end: it saves first, all its processes at the same step."""

import signal
from types import FrameType

import jax


class StopSignals:
    """SIGTERM (a scheduler takes the machine back) and Ctrl-C, as a question to ask after every step.

    A second signal ends the process at once. Where JAX is distributed, SIGTERM stays with JAX's own preemption service,
    which tells every process of it and names a step that all of them still reach; Ctrl-C is handed on to it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._distributed = jax.distributed.is_initialized()
        self._ours = [signal.SIGINT] if self._distributed else [signal.SIGINT, signal.SIGTERM]

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._receive) for number in self._ours}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def due(self, step: int) -> bool:
        """Whether to save and end after this finished step; every process has to ask at every step."""
        if not self._distributed:
            return self.received is not None
        # Here, because it takes seconds to import and one process does without.
        from orbax.checkpoint import multihost

        due = multihost.reached_preemption(step)
        if due:
            self.received = self.received or signal.SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return due

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for ours in self._ours:
            signal.signal(ours, signal.SIG_DFL)
        if self._distributed:
            signal.raise_signal(signal.SIGTERM)
