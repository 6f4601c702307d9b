"""Errors that are the user's to mend: one sentence that names the thing, its value and the fix."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: a missing file, a wrong value, a checkpoint of another model."""


def run_cli(main: Callable[[], None]) -> None:
    """Runs a command's main function; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted; the same command goes on where complete work ends", file=sys.stderr)
        sys.exit(130)
