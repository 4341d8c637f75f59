"""Makes folders in places that users share, such as /tmp, so that no other user can put files there."""

import os
import stat
from pathlib import Path

from cmscale.errors import UserError
from cmscale.io.durable import explained

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def own_folder(path: Path, *, advice: str) -> Path:
    """Makes a folder that this user alone may change; returns its path.

    Args:
        advice: What a user does where somebody else was there first.

    Raises:
        UserError: it is a link, belongs to another user, or others may write there.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            found = path.lstat()  # a link could lead to anything
            if not stat.S_ISDIR(found.st_mode):
                raise UserError(f"{path}: is no folder of this user's; {advice}") from None
            if found.st_uid != os.getuid():
                raise UserError(f"{path}: belongs to user {found.st_uid}, not to {os.getuid()}; {advice}") from None
            if found.st_mode & _OTHERS_WRITE:
                mode = stat.S_IMODE(found.st_mode)
                raise UserError(f"{path}: others may write there (mode {mode:04o}); chmod go-w, or {advice}") from None
    return path
