"""Finds the login and the mode that wandb itself would use: in its variables, its settings files, and netrc."""

import configparser
import netrc
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cmscale.errors import UserError

_DEFAULT_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # of newer releases of wandb, and of older ones
_MODES = ("online", "offline", "disabled", "shared")
_OLD_MODES = {"dryrun": "offline", "run": "online"}  # names that wandb still takes


@dataclass(frozen=True)
class Login:
    """How wandb is set up for this user.

    Attributes:
        host: The server's name, with its port if it has one.
        mode: What the user has chosen for all programs: `online`, `offline`, `disabled`; None if nothing.
    """

    host: str
    has_key: bool
    mode: str | None


def find_login() -> Login:
    """The login for the server that wandb would use, wherever `wandb login` has written it.

    Raises:
        UserError: WANDB_MODE or the settings name a mode that wandb does not have.
    """
    settings = _settings()
    address = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or f"https://{_DEFAULT_HOSTS[0]}"
    host = urlsplit(address).netloc
    hosts = _DEFAULT_HOSTS if host in _DEFAULT_HOSTS else (host,)
    entries = _netrc()
    found = next((each for each in hosts if each in entries), None)
    is_given = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    mode = os.environ.get("WANDB_MODE") or settings.get("mode") or ""
    mode = _OLD_MODES.get(mode, mode)
    if mode and mode not in _MODES:
        raise UserError(f"WANDB_MODE or wandb's settings: {mode} is no mode of wandb; take {', '.join(_MODES)}")
    return Login(found or host, is_given or found is not None, mode or None)


def _settings() -> dict[str, str]:
    """The section `default` of wandb's settings files; that of the folder counts more than that of the user."""
    home = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    folder = Path(os.environ.get("WANDB_DIR") or ".").expanduser()
    found: dict[str, str] = {}
    for file in (home / "settings", folder / "wandb" / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
        if parser.has_section("default"):
            found |= dict(parser["default"])
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
