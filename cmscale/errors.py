"""The one error that means: the user can mend this. Commands print it as a single line and exit with status 2."""


class UserError(ValueError):
    """What a user did wrong, in one line: what, which value, what to do.

    Everything else that is raised is a fault of the program or of the machine (traceback, exit status 1).
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
