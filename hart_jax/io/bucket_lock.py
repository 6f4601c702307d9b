"""Who writes into a folder of a bucket, where there are no locks: an object says so, and is believed for a while.

The owner writes the object anew every `BEAT_SECONDS`. One that has not been for `STALE_SECONDS` is of a run that was
killed, and is taken over; a run that finds an owner waits so long, unless it sees the owner write. An owner that was a
process of this machine, and is none any more, is taken over at once.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hart_jax.errors import TryLater, UserError
from hart_jax.io.buckets import retried
from hart_jax.io.files import write_json

OWNER_FILE = ".owner.json"
BEAT_SECONDS = 30.0
STALE_SECONDS = 120.0
_LOOK_SECONDS = 5.0


def owner(what: str) -> dict[str, Any]:
    """This process, as an owner file says it."""
    return {"what": what, "host": socket.gethostname(), "process": os.getpid(), "command": sys.argv}


def shown(about: Mapping[str, Any]) -> str:
    """An owner in words."""
    command = " ".join(about["command"])
    command = command if len(command) <= 200 else f"{command[:200]}..."
    return f"{about['what']} on host {about['host']}, process {about['process']} ({command})"


def taken(folder: Path, by: str) -> TryLater:
    """What a run is told whose folder belongs to another, `by` in words."""
    return TryLater(f"{folder}: belongs to {by}; wait for it, end it, or give another folder")


class BucketLock:
    """The folder's owner, this process, until `release`.

    Raises:
      TryLater: another run owns the folder.
      UserError: the bucket may not be written to, or does not answer.
    """

    def __init__(self, folder: Path, what: str):
        self._path = folder / OWNER_FILE
        self._about = {**owner(what), "token": uuid.uuid4().hex}
        self._wait_for_owner()
        self._write()
        # Of two that wrote at once, the later one is the owner.
        now = self._read()
        if now is not None and now.get("token") != self._about["token"]:
            raise self._taken(now)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        # A bucket that does not answer any more is no reason to fail: the owner is stale soon.
        with contextlib.suppress(Exception):
            about = self._read()
            if about is not None and about.get("token") == self._about["token"]:
                self._path.unlink()

    def _wait_for_owner(self) -> None:
        first = self._read()
        if first is None or _is_dead(first):
            return
        until = time.monotonic() + STALE_SECONDS
        print(f"{self._path.parent}: was left by {shown(first)}, or still is its: waits up to {STALE_SECONDS:.0f} s")
        while time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
            now = self._read()
            if now is None:
                return
            if now != first:
                raise self._taken(now)

    def _taken(self, about: Mapping[str, Any]) -> TryLater:
        return taken(self._path.parent, shown(about))

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            # The next one may succeed.
            with contextlib.suppress(Exception):
                now = self._read()
                if now is not None and now.get("token") != self._about["token"]:
                    print(f"warning: {self._taken(now)}", file=sys.stderr)
                    return
                self._write()

    def _write(self) -> None:
        write_json(self._path, {**self._about, "time": time.time()})

    def _read(self) -> dict[str, Any] | None:
        """Who is the owner; None for nobody, or for a file that says nothing."""
        try:
            about = json.loads(retried(self._path, self._path.read_text))
            shown(about)
            return about
        except UserError:  # a ValueError too
            raise
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def _is_dead(about: Mapping[str, Any]) -> bool:
    """Whether an owner was a process of this machine that has ended."""
    if about["host"] != socket.gethostname() or not isinstance(about["process"], int):
        return False
    # In a container, a restarted run often has the number of the one before.
    if about["process"] == os.getpid():
        return True
    try:
        os.kill(about["process"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        # Another user's.
        pass
    return False
