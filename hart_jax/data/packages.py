"""The packages the picture set is made of: fetched once with npm and apt-get, read without unpacking."""

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hart_jax.errors import UserError


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


def cache_folder() -> Path:
    """Where downloads are kept between runs: `$XDG_CACHE_HOME/hart_jax/packages`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hart_jax" / "packages"


def locate(package: Package, folder: Path | None = None) -> Path:
    """The package's file, from `folder` if given (never downloading then), else from the cache, fetched if missing.

    Raises:
      UserError: the file is not in `folder`, or npm or apt-get is missing or fails.
    """
    place = folder or cache_folder()
    found = sorted(place.glob(package.file_pattern))
    if found:
        return found[-1]
    if folder is not None:
        raise UserError(f"--packages {folder} has no {package.file_pattern}; put it there, or leave the option out")
    return _download(package, place)


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
        os.replace(found[-1], place / found[-1].name)
        return place / found[-1].name
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_files(
    package: Package, path: Path, *, suffixes: tuple[str, ...], under: str = ""
) -> Iterator[tuple[str, bytes]]:
    """Yields (name inside the package, bytes) of the regular files below `under` that end in one of `suffixes`."""
    try:
        with _open_tar(package, path) as archive:
            for member in archive:
                name = member.name.removeprefix("./").removeprefix("package/")
                if member.isfile() and name.startswith(under) and name.endswith(suffixes):
                    file = archive.extractfile(member)
                    if file is not None:
                        yield name, file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"package file {path} cannot be read ({error}); delete it and fetch it again") from error


def _open_tar(package: Package, path: Path) -> tarfile.TarFile:
    if package.kind == "npm":
        return tarfile.open(path, "r:gz")
    if shutil.which("dpkg-deb") is None:
        raise UserError(f"dpkg-deb is needed to read {path.name} and is not installed; install the dpkg package")
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True)
    if done.returncode:
        raise UserError(f"package file {path} cannot be read ({done.stderr.decode().strip()}); fetch it again")
    return tarfile.open(fileobj=io.BytesIO(done.stdout))
