"""Command lines of `train.py` and `sample.py`: `--config=FILE --config.a.b=1` beside a program's own flags."""

import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from hart_jax.errors import UserError
from hart_jax.experiment import Experiment, experiment_from

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Experiment: a file in configs/.")


def parse(argv: Sequence[str] | None = None) -> None:
    """Parses the command line (`sys.argv` if not given) into absl's flags.

    Raises:
      UserError: an unknown flag or config key, a config file that is missing, or a value of the wrong type.
    """
    argv = list(sys.argv if argv is None else argv)
    try:
        rest = flags.FLAGS(argv)
    except FileNotFoundError as error:
        raise UserError(f"--config: {error}; see configs/ for the experiments there are") from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).strip("'\"").split())) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value")


def experiment() -> Experiment:
    """The experiment that --config and its overrides describe, checked."""
    if _CONFIG.value is None:
        raise UserError("--config is missing: give a file of configs/, like --config=configs/emoji_hart.py")
    return experiment_from(_CONFIG.value.to_dict())
