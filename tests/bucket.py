"""A bucket on loopback, with the real clients: `gcp-storage-emulator` in this process, for it and those it starts."""

import contextlib
import functools
import http.server
import importlib.util
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BUCKET = "gs://bucket"


# How long a request that has come may still take when the server stops.
ANSWER_SECONDS = 10


class Threads(http.server.ThreadingHTTPServer):
    """Answers each connection in a thread of its own. When it stops, it answers what it was asked, and nothing more.

    Were an answer lost, the client would ask again; and the emulator, unlike a real bucket, does not know an upload
    that it has completed.
    """

    daemon_threads = True

    def __init__(self, *arguments) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request, client_address) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        """Nothing: the emulator reports every missing object, and clients that are killed."""

    def server_close(self) -> None:
        super().server_close()
        deadline = time.monotonic() + ANSWER_SECONDS
        while self._open and time.monotonic() < deadline:
            time.sleep(0.01)
        for request in tuple(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)


class Emulator:
    """Serves the bucket "bucket"; `stop` and `start` again keep what is in it."""

    def __init__(self) -> None:
        with socket.create_server(("localhost", 0)) as server:
            self.port = server.getsockname()[1]
        from gcp_storage_emulator.storage import Storage

        self._storage = Storage(use_memory_fs=True)
        self._storage.create_bucket("bucket", {"kind": "storage#bucket", "id": "bucket", "name": "bucket"})

    @property
    def environment(self) -> dict[str, str]:
        address = f"http://localhost:{self.port}"
        return {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "NO_GCE_CHECK": "true",
        }

    def start(self) -> None:
        from gcp_storage_emulator.server import RequestHandler

        self._httpd = Threads(("localhost", self.port), functools.partial(RequestHandler, self._storage))
        threading.Thread(target=self._httpd.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()


def require_clients() -> None:
    """Skips where a package is missing. gcsfs must not be imported before `hart_jax.io.paths` sets its environment."""
    for package in ("gcsfs", "gcp_storage_emulator"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed", allow_module_level=True)


@functools.cache
def emulator() -> Emulator:
    """One for the process: its clients remember the address."""
    return Emulator()


@contextmanager
def emulated_bucket() -> Iterator[Emulator]:
    """The emulator, running, and the environment that leads this process's clients to it."""
    require_clients()
    bucket = emulator()
    with pytest.MonkeyPatch.context() as patch:
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        bucket.start()
        try:
            yield bucket
        finally:
            bucket.stop()
