"""The error that a user can mend. Commands print it as one line and exit with status 2."""


class UserError(ValueError):
    """A user's mistake, in one line: what is wrong, which value, what to do.

    Every other exception is a fault of the program or of the machine: a traceback, exit status 1.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
