"""Finds the login and the mode that wandb itself would use: in its variables, its settings files, and netrc."""

import configparser
import netrc
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from cmscale.errors import UserError

_DEFAULT_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # of newer releases of wandb, and of older ones
_MODES = ("online", "offline", "disabled", "shared")
_ANSWER_SECONDS = 5.0
_OLD_MODES = {"dryrun": "offline", "run": "online"}  # names that wandb still takes


@dataclass(frozen=True)
class Login:
    """How wandb is set up for this user.

    Attributes:
        address: The server's URL.
        mode: What the user has chosen for all programs: `online`, `offline`, `disabled`; None if nothing.
        mode_from: Where it was chosen: the variable, or the settings file.
        has_proxy: Whether wandb has a proxy of its own.
    """

    address: str
    has_key: bool
    mode: str | None
    mode_from: str
    has_proxy: bool = False

    @property
    def host(self) -> str:
        """The server's name, with its port if it has one."""
        return urlsplit(self.address).netloc

    def why_silent(self) -> str:
        """Why the server takes no connection; empty if it does, or is behind a proxy."""
        parts = urlsplit(self.address)
        name = parts.hostname or ""
        if self.has_proxy or (not proxy_bypass(name) and getproxies().keys() & {parts.scheme, "all"}):
            return ""
        try:
            port = parts.port or (80 if parts.scheme == "http" else 443)
            socket.create_connection((name, port), timeout=_ANSWER_SECONDS).close()
        except OSError as error:
            return str(error)
        return ""


def find_login() -> Login:
    """The login for the server that wandb would use, wherever `wandb login` has written it.

    Raises:
        UserError: WANDB_MODE or the settings name a mode that wandb does not have, or a server by something else than
            its URL.
    """
    settings = _settings()
    address, address_from = settings.get("base_url", (f"https://{_DEFAULT_HOSTS[0]}", ""))
    if not _is_url(address):
        raise UserError(f"{address_from}: {address} is no URL of a server; write https://HOST")
    host = urlsplit(address).netloc
    hosts = _DEFAULT_HOSTS if host in _DEFAULT_HOSTS else (host,)
    entries = _netrc()
    found = next((each for each in hosts if each in entries), None)
    is_given = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    mode, mode_from = settings.get("mode", ("", ""))
    mode = _OLD_MODES.get(mode, mode)
    if mode and mode not in _MODES:
        raise UserError(f"{mode_from}: {mode} is no mode of wandb; take {', '.join(_MODES)}")
    has_proxy = not settings.keys().isdisjoint({"http_proxy", "https_proxy"})
    return Login(address, is_given or found is not None, mode or None, mode_from, has_proxy)


def _is_url(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # of a port
        return False


def _settings() -> dict[str, tuple[str, str]]:
    """What wandb's variables and the section `default` of its settings files say, and where.

    The file of the folder counts more than that of the user, and a variable more than both.
    """
    home = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    folder = Path(os.environ.get("WANDB_DIR") or ".").expanduser()
    found: dict[str, tuple[str, str]] = {}
    for file in (home / "settings", folder / "wandb" / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
        if parser.has_section("default"):
            found |= {name: (value, str(file)) for name, value in parser["default"].items() if value}
    for name in ("base_url", "mode", "http_proxy", "https_proxy"):
        if value := os.environ.get(variable := f"WANDB_{name.upper()}"):
            found[name] = (value, variable)
    return found


def _netrc() -> set[str]:
    """The machines that a netrc file has a password for."""
    given = os.environ.get("NETRC")
    for file in [given] if given else ["~/.netrc", "~/_netrc"]:
        try:
            entries = netrc.netrc(Path(file).expanduser()).hosts
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        return {name for name, (_, _, password) in entries.items() if password}
    return set()
