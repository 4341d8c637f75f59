"""Errors that commands print as lines: a user's mistakes (exit status 2); full disks and missing copies (1)."""

_LONGEST = 1500  # characters: what is longer hides what it says


class UserError(ValueError):
    """A user's mistakes, in one line each: what is wrong, which value, what to do.

    Every other exception is a fault of the program or of the machine: a traceback, exit status 1.

    Attributes:
        status: The exit status of a command that ends by it.
    """

    status = 2

    def __init__(self, message: str, *more: str) -> None:
        super().__init__(*map(one_line, (message, *more)))

    def __str__(self) -> str:
        return "\n".join(self.args)


class NoSpace(UserError):
    """Raised where no space is left to write. Nobody made a mistake: exit status 1.

    A job that meets it is not started again, as it would meet it again.
    """

    status = 1


class DamagedInput(RuntimeError):
    """Raised for stored data that turn out to be damaged while they are read.

    Commands print it as one line and exit with status 2. In a job it is a fault: a restart may find the data intact.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class NotExported(Exception):
    """Raised by a job that has finished its work, but could not copy all of it to where it was told to.

    Another start of the job would change nothing, so none follows.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """A message as one line that a terminal shows.

    Names in it may come from anyone: escape sequences and bytes that are not UTF-8 are written out, and the middle of
    an endless message is left out.
    """
    text = " ".join(message.split())
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    return printable(text)


def printable(text: str) -> str:
    """Text of anyone, such as a folder's name, as a terminal may show it: escape sequences are written out."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
