"""Command lines of `train.py` and `sample.py`: `--config=FILE --config.a.b=1` beside a program's own flags."""

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from hart_jax.config import (
    CONFIG_FILE_HELP,
    Experiment,
    HartExperiment,
    TokenizerExperiment,
    experiment_from,
    raised_in,
    read_config,
    split_config,
)
from hart_jax.errors import UserError

# A setting that the file leaves at its default can be given too; `experiment_from` knows which settings there are.
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="Experiment: a file in configs/, or a stage of one: configs/emoji_hart.py:stage=2. With --help, its "
    "settings are listed.",
    lock_config=False,
    accept_new_attributes=True,
)


def parse(argv: Sequence[str] | None = None, instead: Mapping[str, str] | None = None) -> None:
    """Parses the command line (`sys.argv` if not given) into absl's flags.

    Args:
      instead: what to say about flags that there are not, by name.

    Raises:
      UserError: an unknown flag or config section, a config file that is missing, or a value of the wrong type.
    """
    argv = list(sys.argv if argv is None else argv)
    asked = {"--help", "-h"} & set(argv)
    if asked:
        own_flags = flags.FLAGS.main_module_help(), flags.FLAGS.module_help(__name__)
        print(sys.modules["__main__"].__doc__, *own_flags, sep="\n")
    _parse([argument for argument in argv if argument not in asked], instead or {})
    if asked:
        if given():
            print(f"\nSettings, with the values that they have here:\n\n{experiment().listing('--config.')}")
        sys.exit(0)


def _parse(argv: list[str], instead: Mapping[str, str]) -> None:
    files = _config_files(argv)
    try:
        rest = flags.FLAGS(argv)
    except Exception as error:
        for path in files:
            if (sentence := raised_in(path, error)) is not None:
                raise UserError(f"--config={sentence}") from error
        if isinstance(error, flags.UnrecognizedFlagError) and error.flagname in instead:
            raise UserError(f"there is no --{error.flagname}; {instead[error.flagname]}") from None
        if (sentence := _no_such_setting(argv)) is not None:
            raise UserError(sentence) from None
        if isinstance(error, flags.UnrecognizedFlagError) and error.flagname.startswith("config.") and not files:
            raise UserError(f"--{error.flagname}: changes a setting of --config=FILE; give --config, too") from None
        if isinstance(error, KeyError):
            raise UserError(f"--config: the config file has no such section ({error.args[0]})") from None
        if isinstance(error, AttributeError):
            raise UserError(f"--config: {CONFIG_FILE_HELP} ({error})") from None
        if isinstance(error, (flags.Error, TypeError, ValueError, SyntaxError)):
            raise UserError(" ".join(str(error).split())) from None
        raise
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value")


def given() -> bool:
    """Whether there is a --config."""
    return _CONFIG.value is not None


def experiment() -> Experiment:
    """The experiment that --config and its overrides describe, checked."""
    if _CONFIG.value is None:
        raise UserError("--config is missing: give a file of configs/, like --config=configs/emoji_hart.py")
    if not isinstance(_CONFIG.value, ConfigDict):
        raise UserError(f"--config: {CONFIG_FILE_HELP}")
    return experiment_from(_CONFIG.value.to_dict())


def _no_such_setting(argv: list[str]) -> str | None:
    """Names the first --config.a.b that no experiment has, and what may be meant; None if there are all of them."""
    known = {name for kind in (HartExperiment, TokenizerExperiment) for name in kind.names()}
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0].removeprefix("config.")
        if not argument.lstrip("-").startswith("config.") or name in known:
            continue
        same = sorted(other for other in known if other.split(".")[-1] == name.split(".")[-1])
        close = same or difflib.get_close_matches(name, sorted(known), n=1)
        meant = f"did you mean {' or '.join(f'--config.{other}' for other in close)}? " if close else ""
        return f"--config.{name}: no such setting; {meant}--config=FILE --help lists all"
    return None


def _config_files(argv: list[str]) -> list[str]:
    """Those of --config, checked here, because ml_collections reports what is missing late and at length."""
    files = []
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            value = value if equals else following
            file, stage = split_config(value)
            files.append(file)
            if not Path(file).is_file():
                raise UserError(f"--config={file}: no such file; see configs/ for the experiments there are")
            if stage:
                try:
                    read_config(value)
                except UserError as error:
                    raise UserError(f"--config={error}") from error
    return files
