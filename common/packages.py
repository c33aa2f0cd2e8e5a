"""Find the files of installed packages that are used for their data only. The packages are never imported."""

from importlib import metadata
from pathlib import Path

from common.cli import fail


def package_path(package: str, version: str, relative_path: str, install: str) -> Path:
    """Return the absolute path of a file of an installed package, without importing the package.

    Exits with code 2 if the package is not installed in this version. The message contains the command `install`.
    """
    distribution = next(iter(metadata.distributions(name=package)), None)
    if distribution is None or distribution.version != version:
        fail(f"{package} {version} is not installed: run `{install}`")
    return Path(str(distribution.locate_file(relative_path)))
