"""Signals that ask a run to end: it saves first, all its processes at the same step."""

import os
import signal
from types import FrameType

import jax


class StopSignals:
    """SIGTERM (a scheduler takes the machine back) and Ctrl-C, as a question to ask after every step.

    It is acknowledged at once; a second signal ends the process. Where JAX is distributed, SIGTERM stays with JAX's own
    preemption service, which tells every process of it and names a step that all of them still reach; Ctrl-C is handed
    on to it.
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
        # Not by `print`, which a signal may have interrupted.
        os.write(2, f"\n{self.received.name}: saving after this step; again ends at once\n".encode())
        for ours in self._ours:
            signal.signal(ours, signal.SIG_DFL)
        if self._distributed:
            signal.raise_signal(signal.SIGTERM)


class StopAnyTime:
    """The same where processes do not work in step: each ends on its own, soon after one of them was asked to.

    JAX's preemption service, which names a common step, has no say within it, and not afterwards either.
    """

    # In the store that JAX's processes share. A job that was asked to end does not go on.
    _KEY = "hart_jax/stop"

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._told = False

    def __enter__(self) -> "StopAnyTime":
        self._before = {
            number: signal.signal(number, self._receive) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def due(self) -> bool:
        """Whether to end; tells the other processes and hears of them."""
        if not jax.distributed.is_initialized():
            return self.received is not None
        # Here, because it takes seconds to import and one process does without.
        from orbax.checkpoint import multihost

        client = multihost.get_jax_distributed_client()
        if self.received is None:
            said = [value for _, value in client.key_value_dir_get(self._KEY)]
            self.received = signal.Signals(int(said[0])) if said else None
        elif not self._told:
            client.key_value_set(f"{self._KEY}/{jax.process_index()}", str(int(self.received)))
            self._told = True
        return self.received is not None

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for ours in self._before:
            signal.signal(ours, signal.SIG_DFL)
