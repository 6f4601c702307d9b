"""Command lines of `train.py` and `sample.py`: `--config=FILE --config.a.b=1` beside a program's own flags."""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from hart_jax.config import CONFIG_FILE_HELP, Experiment, experiment_from, raised_in, read_config, split_config
from hart_jax.errors import UserError

# A setting that the file leaves at its default can be given too; `experiment_from` knows which settings there are.
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="Experiment: a file in configs/, or a stage of one: configs/emoji_hart.py:stage=2.",
    lock_config=False,
    accept_new_attributes=True,
)


def parse(argv: Sequence[str] | None = None) -> None:
    """Parses the command line (`sys.argv` if not given) into absl's flags.

    Raises:
      UserError: an unknown flag or config section, a config file that is missing, or a value of the wrong type.
    """
    argv = list(sys.argv if argv is None else argv)
    if {"--help", "-h"} & set(argv):
        own_flags = flags.FLAGS.main_module_help(), flags.FLAGS.module_help(__name__)
        print(sys.modules["__main__"].__doc__, *own_flags, sep="\n")
        sys.exit(0)
    files = _config_files(argv)
    try:
        rest = flags.FLAGS(argv)
    except Exception as error:
        for path in files:
            if (sentence := raised_in(path, error)) is not None:
                raise UserError(f"--config={sentence}") from error
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
