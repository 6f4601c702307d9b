"""Paths as the user gives them: local ones, and those of Google Cloud Storage buckets (gs://bucket/folder).

`as_path` is the one place where a text becomes a path. A local one is a `pathlib.Path`; one in a bucket is an
`etils.epath.Path`, which has the same methods, and is typed as the former. What needs a file on this machine takes
`hart_jax.io.buckets.local_copy` of it.
"""

import glob
import importlib.util
import os
import re
from pathlib import Path
from typing import Any, cast

from hart_jax.errors import UserError

GS = "gs://"
# One letter is a drive's, not a scheme's; pathlib makes one slash of two.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
# What clients of a bucket read as patterns, or as the end of the name; Google advises against them.
_NOT_IN_BUCKETS = re.compile(r"[*?\[#]")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(GS)


def as_path(text: str | os.PathLike[str], setting: str = "") -> Path:
    """The path that a user means.

    Args:
      text: a local path or gs://bucket/folder; a path from here comes back as it is.
      setting: what gave it ("--workdir"), for messages.

    Raises:
      UserError: of another scheme than gs://, without a bucket, with * ? [ # in one, or where gcsfs is not installed.
    """
    text = os.fspath(text)
    check_path(text, setting)
    if not is_remote(text):
        return Path(text)
    if importlib.util.find_spec("gcsfs") is None:
        name = f"{setting}={text}" if setting else text
        raise UserError(f"{name}: a bucket needs the package gcsfs; install it with: pip install 'hart_jax[gcs]'")
    return cast(Path, _bucket_path(text))


def check_path(text: str | os.PathLike[str], setting: str = "") -> None:
    """Raises `UserError` for a path of another scheme than gs://, or without a bucket, or with * ? [ # in one."""
    text = os.fspath(text)
    scheme = _SCHEME.match(text)
    name = f"{setting}={text}" if setting else text
    if scheme and not is_remote(text):
        raise UserError(f"{name}: there is no storage {scheme[1]}: here; give a local path or gs://bucket/folder")
    if scheme and (not text.removeprefix(GS).strip("/") or text.startswith(GS + "/")):
        raise UserError(f"{name}: names no bucket; give gs://bucket/folder")
    if scheme and (found := _NOT_IN_BUCKETS.search(text)):
        raise UserError(f"{name}: a path in a bucket cannot have {found[0]} in it; give another name")


def check_no_pattern(path: Path, setting: str) -> None:
    """Raises `UserError` where a path, from the root on, looks like a pattern of names: with * ? [ in it.

    Orbax would look for what it has just written by that pattern, not find it, and call the checkpoint complete.
    """
    if glob.has_magic(os.fspath(absolute(path))):
        raise UserError(
            f"{setting}={absolute(path)}: checkpoints cannot be kept below a name with *, ? or [; rename it"
        )


def local_only(text: str | os.PathLike[str], setting: str = "") -> Path:
    """As `as_path`, of what can be local alone; `UserError` for a bucket."""
    check_path(text, setting)
    if is_remote(text):
        name = f"{setting}={text}" if setting else text
        raise UserError(f"{name}: cannot be in a bucket; give a local path, and copy what is there in the end")
    return Path(text)


def absolute(path: Path) -> Path:
    """The path from the root on; one in a bucket as it is."""
    return path if is_remote(path) else path.absolute()


def make_folder(path: Path) -> None:
    """Makes a local folder, and those above it; in a bucket there are no folders to make."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def _bucket_path(text: str) -> Any:
    # Before gcsfs is imported: otherwise it asks a service of its own for every bucket's kind.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # The same client whether TensorFlow is there or not.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec.config
    from etils import epath

    # A listing that is kept does not see what other hosts write.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    return epath.Path(text)
