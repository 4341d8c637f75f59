"""Guards the use of other packages' private parts: a renamed one is an error that names the versions, never a guess."""

import importlib.metadata
import importlib.util
import re
import warnings
from functools import cache
from typing import Any

from cmscale.errors import UserError

# The versions that the private parts were read in and the tests ran with. pyproject.toml bounds the packages by them.
TESTED = {"deepspeed": "0.19.8", "mosaicml-streaming": "0.13.0", "submitit": "1.5.4", "torch": "2.15.0"}
OLDEST = {"torch": "2.9.0"}
"""The oldest tested version, of the packages that serve in a range of versions up to the one in `TESTED`."""


class UnsupportedVersion(UserError):
    """Raised when a package lacks a part that this program relies on."""


@cache
def check_tested(package: str) -> None:
    """Warns, once per process, if the installed version of a package is of another series than the tested ones."""
    found, newest = importlib.metadata.version(package), TESTED[package]
    oldest = OLDEST.get(package, newest)
    if not _series(oldest) <= _series(found) <= _series(newest):
        tested = f"tested are {oldest} to {newest}" if oldest != newest else f"tested is {newest}"
        warnings.warn(
            f"{package} {found} is installed, {tested}: its private parts may have changed",
            stacklevel=2,
        )


def _series(version: str) -> list[int]:
    """The first two numbers of a version: [2, 9] of `2.9.0+cu128`."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def require(name: str, *, key: str) -> None:
    """Refuses a config that needs a package which is not installed.

    Raises:
        UserError: it is missing.
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{key}: the package {name} is not installed here; pip install {name}, or leave the key out")


def private(owner: Any, attribute: str, *, package: str) -> Any:
    """`owner.attribute`, a part of `package` that its versions may rename.

    Raises:
        UnsupportedVersion: there is no such attribute.
    """
    try:
        return getattr(owner, attribute)
    except AttributeError:
        raise unsupported(f"{_name(owner)} has no attribute {attribute!r}", package=package) from None


def unsupported(problem: str, *, package: str) -> UnsupportedVersion:
    """The error to raise for a part of `package` that is not as expected."""
    found = importlib.metadata.version(package)
    return UnsupportedVersion(
        f"{package} {found}: {problem}, and cmscale relies on it; install {package}=={TESTED[package]}, which is tested"
    )


def qualified_name(kind: type) -> str:
    """`module.Class`, the name by which tables of classes know a class without importing it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _name(owner: Any) -> str:
    if isinstance(owner, type):
        return qualified_name(owner)
    return getattr(owner, "__name__", None) or qualified_name(type(owner))
