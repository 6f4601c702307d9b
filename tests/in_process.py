"""Commands in the process of the tests, as if each ran in one of its own.

For all that is not about signals, several processes or devices: Python and JAX start once, and a program is compiled
once. What a command leaves behind in its process (flags, settings of JAX, handlers, folder) is put back.
"""

import contextlib
import io
import os
import runpy
import signal
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

import jax
import pytest
from absl import flags

import hart_jax.flags  # noqa: F401  defines --config, once for all programs
from hart_jax.errors import run_cli
from tests.quickly import ROOT

# What programs change in JAX.
SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
HANDLED = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def only_flags_of(program: str) -> Iterator[None]:
    """No flags of other programs while this one runs; afterwards all as before, without values."""
    others = [
        (module, flag)
        for module, own in flags.FLAGS.flags_by_module_dict().items()
        for flag in own
        if module.startswith("hart_jax.") and module not in ("hart_jax.flags", program)
    ]
    for _, flag in others:
        delattr(flags.FLAGS, flag.name)
    before = set(flags.FLAGS)
    try:
        yield
    finally:
        flags.FLAGS.unparse_flags()
        own = {flag.name for flag in flags.FLAGS.flags_by_module_dict().get(program, ())}
        for name in set(flags.FLAGS) - before:
            if name in own or name.startswith("config."):
                delattr(flags.FLAGS, name)
        for module, flag in others:
            flags.FLAGS[flag.name] = flag
            flags.FLAGS.register_flag_by_module(module, flag)


@contextlib.contextmanager
def restored_process() -> Iterator[None]:
    settings = {name: jax.config.values[name] for name in SETTINGS}
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    hook, folder = sys.unraisablehook, Path.cwd()
    try:
        yield
    finally:
        # The last config file's module; a file without `get_config` would be taken for it.
        sys.modules.pop("config_config", None)
        os.chdir(folder)
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in settings.items():
            jax.config.update(name, value)


def run_here(
    program: str, *arguments: str, folder: Path = ROOT, environment: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a program in `folder`.

    Args:
      program: a file of the repository's root, like sample.py, or a module, like hart_jax.checkpoints.export.
    """
    is_file, out, err = program.endswith(".py"), io.StringIO(), io.StringIO()
    path = str(ROOT / program) if is_file else program
    main = None if is_file else import_module(program).main
    with pytest.MonkeyPatch.context() as patch, restored_process(), only_flags_of(path):
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", [path, *arguments])
        # This process is no job's: JAX has started, and whether there are others is asked before.
        patch.setattr("hart_jax.parallel.launch._initialize", lambda: None)
        os.chdir(folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                if main:
                    run_cli(main)
                else:
                    runpy.run_path(path, run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code or 0
    assert isinstance(code, int), code
    return code, out.getvalue(), err.getvalue()
