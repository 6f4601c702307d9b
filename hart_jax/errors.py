"""Errors that are the user's to fix: one sentence that names the thing, its value and the fix."""

import _thread
import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable
from typing import Any

# What to do about an operating system's error, by its number. Others are taken for faults of the program.
_FIXES = {
    errno.EACCES: "change its owner or mode, or give another path",
    errno.EPERM: "change its owner or mode, or give another path",
    errno.EROFS: "give a path that can be written to",
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space, then run the same command again",
    errno.EFBIG: "give a path on another file system",
    errno.ENOTDIR: "a file lies where a folder should be; remove it, or give another path",
    errno.EISDIR: "give the name of a file",
    errno.EEXIST: "remove it, or give another path",
    errno.ENOENT: "check the path",
    errno.ELOOP: "its links point at each other; fix them",
    errno.ENAMETOOLONG: "give a shorter name; most file systems take 255 bytes",
    errno.EMFILE: "raise the limit with `ulimit -n`",
    errno.ENFILE: "close other programs",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount it again, then run the same command again",
    errno.ETXTBSY: "end the program that uses it",
    errno.ENODEV: "give a path on another file system",
}
# These say enough without the name of a file.
_WITHOUT_NAME = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EIO)


class UserError(ValueError):
    """Bad input: a missing file, a wrong value, a checkpoint of another model."""

    exit_code = 2


class TryLater(UserError):
    """Something that the same command may find in order a little later: a folder in use, a server that is away."""

    # EX_TEMPFAIL of sysexits.h, by which a scheduler can tell it from what no restart fixes.
    exit_code = 75


def run_cli(main: Callable[[], None]) -> None:
    """Runs a command's main function.

    What the user can fix is one line on stderr and exit code 2: a `UserError`, an error of the operating system that
    names its file, and a device that JAX was asked for and does not find. What may pass (`TryLater`) is exit code 75,
    Ctrl-C is 130. All else is a fault of the program and keeps its traceback.
    """
    never_swallow_interrupts()
    try:
        main()
    except UserError as error:
        _end(str(error), error.exit_code)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted; the same command goes on where complete work ends", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sentence = os_error_sentence(error)
        if sentence is None:
            raise
        _end(sentence)
    except (AssertionError, RuntimeError):
        # JAX reports a missing plug-in in many ways, a bare AssertionError among them.
        sentence = missing_device()
        if sentence is None:
            raise
        _end(sentence)


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


def os_error_sentence(error: OSError) -> str | None:
    """What is wrong with which path, and the fix; None where the error does not say."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        source, target, reason = error.args[0][0]
        return f"{source}: cannot be copied to {target}: {reason}"
    fix, path = _FIXES.get(error.errno or 0), error.filename2 or error.filename
    if fix is None or (path is None and error.errno not in _WITHOUT_NAME):
        return None
    where = f"{os.fsdecode(path)}: " if isinstance(path, (str, bytes, os.PathLike)) else ""
    return f"{where}{error.strerror}; {fix}"


def missing_device() -> str | None:
    """What is wrong where $JAX_PLATFORMS asks for a device that JAX does not find; None where nothing is."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms or "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except Exception as error:  # RuntimeError or AssertionError, as the plug-in has it
        reason = (str(error).strip() or "its plug-in is not installed").splitlines()[0]
        asked = f"JAX_PLATFORMS={platforms}"
        return f"{asked}: JAX finds no such device ({reason}); install JAX for it, or unset JAX_PLATFORMS"
    return None


def _end(sentence: str, code: int = UserError.exit_code) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)
