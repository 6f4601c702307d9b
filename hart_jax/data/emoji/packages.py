"""The packages the image set is made of: fetched once with npm and apt-get, read without unpacking."""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hart_jax.errors import UserError
from hart_jax.io.archives import check_unpacked
from hart_jax.io.cache_dir import cache_folder
from hart_jax.io.fingerprint import sha256sum


@dataclass(frozen=True)
class Package:
    """One package: `kind` is "npm" (pinned by `version`) or "deb" (the distribution's version)."""

    name: str
    kind: str
    licence: str
    version: str = ""

    @property
    def file_pattern(self) -> str:
        """Glob of the downloaded file's name."""
        if self.kind == "deb":
            return f"{self.name}_*.deb"
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


EMOJIBASE = Package("emojibase-data", "npm", "MIT", "17.0.0")
FLUENT_3D = Package("@lobehub/fluent-emoji-3d", "npm", "MIT", "1.1.0")
FLUENT = Package("@iconify-json/fluent-emoji", "npm", "MIT", "1.2.7")
FLUENT_FLAT = Package("@iconify-json/fluent-emoji-flat", "npm", "MIT", "1.2.6")
NOTO = Package("@iconify-json/noto", "npm", "Apache-2.0", "1.2.9")
TWEMOJI = Package("@iconify-json/twemoji", "npm", "CC-BY-4.0", "1.2.5")
OPENCLIPART = Package("openclipart-svg", "deb", "public domain")
SWEETHOME3D = Package("sweethome3d-furniture", "deb", "CC0 and CC-BY-3.0")


# Of the packages' files by name. A Debian package of another release has another name, and none here.
SHA256 = {
    "emojibase-data-17.0.0.tgz": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "iconify-json-fluent-emoji-1.2.7.tgz": "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    "iconify-json-fluent-emoji-flat-1.2.6.tgz": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    "iconify-json-noto-1.2.9.tgz": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "iconify-json-twemoji-1.2.5.tgz": "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    "lobehub-fluent-emoji-3d-1.1.0.tgz": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "openclipart-svg_1%3a0.18+dfsg-19_all.deb": "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    "sweethome3d-furniture_1.8-1_all.deb": "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
}


def locate(package: Package, folder: Path | None = None) -> Path:
    """The package's file, from `folder` if given (never downloading then), else from the cache, fetched if missing.

    Its content must be that of `SHA256`. Of a Debian package of a release that is not there, apt-get has compared it
    with what the distribution signed; from a `folder` it is taken with a warning.

    Raises:
      UserError: the file is not in `folder` or not what was published, npm or apt-get is missing or fails, or there is
        no folder to keep it in.
    """
    place = folder
    if place is None:
        cache = cache_folder()
        if cache is None:
            raise UserError("packages need a folder to be kept in: set HART_CACHE_DIR, or give --packages")
        place = cache / "packages"
    found = sorted(place.glob(package.file_pattern))
    if found:
        check_published(found[-1], warn=folder is not None)
        return found[-1]
    if folder is not None:
        raise UserError(f"--packages {folder} has no {package.file_pattern}; put it there, or leave the option out")
    return _download(package, place)


def check_published(path: Path, warn: bool = False) -> None:
    """Raises `UserError` where a package's file is not what was published; `warn` where that is not known."""
    if path.name in SHA256:
        size = path.stat()
        if _sha256(path, size.st_size, size.st_mtime_ns) != SHA256[path.name]:
            raise UserError(f"package file {path} is not the one that was published; delete it and fetch it again")
    elif warn:
        print(f"warning: no checksum of {path} is known; it is used as it is", file=sys.stderr)


@functools.cache
def _sha256(path: Path, *_: int) -> str:
    return sha256sum(path)


def _download(package: Package, place: Path) -> Path:
    if package.kind == "npm":
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    else:
        command = ["apt-get", "download", package.name]
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is needed to fetch {package.name} and is not installed; install it, "
            f"pass --packages with a folder that has {package.file_pattern}, or leave the style out with --styles"
        )
    place.mkdir(parents=True, exist_ok=True)
    partial = place / f".partial-{os.getpid()}"
    partial.mkdir()
    try:
        done = subprocess.run(command, cwd=partial, capture_output=True, text=True)
        found = sorted(partial.glob(package.file_pattern))
        if done.returncode or not found:
            reason = (done.stderr.strip() or done.stdout.strip() or "no file came").splitlines()[-1]
            raise UserError(f"`{' '.join(command)}` failed: {reason}")
        check_published(found[-1])
        os.replace(found[-1], place / found[-1].name)
        return place / found[-1].name
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_files(
    package: Package, path: Path, *, suffixes: tuple[str, ...], under: str = ""
) -> Iterator[tuple[str, bytes]]:
    """Yields (name inside the package, bytes) of the regular files below `under` that end in one of `suffixes`."""
    total = 0
    try:
        with _open_tar(package, path) as archive:
            for member in archive:
                name = member.name.removeprefix("./").removeprefix("package/")
                if member.isfile() and name.startswith(under) and name.endswith(suffixes):
                    total += member.size
                    check_unpacked(path, [total])
                    file = archive.extractfile(member)
                    if file is not None:
                        yield name, file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"package file {path} cannot be read ({error}); delete it and fetch it again") from error


@contextlib.contextmanager
def _open_tar(package: Package, path: Path) -> Iterator[tarfile.TarFile]:
    if package.kind == "npm":
        with tarfile.open(path, "r:gz") as archive:
            yield archive
        return
    if shutil.which("dpkg-deb") is None:
        raise UserError(f"dpkg-deb is needed to read {path.name} and is not installed; install the dpkg package")
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    # As a stream: unpacked, a package may be larger than memory.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                yield archive
        finally:
            process.kill()
