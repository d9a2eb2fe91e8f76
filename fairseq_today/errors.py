"""The one exception for a user's mistake."""


class UserError(ValueError):
    """A mistake in a flag, a file or the data that the user can put right.

    The message is one line that names the flag or file, its value and the remedy. The command line
    prints it as ``error: <message>`` and exits with status 1, without a traceback.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # a value may have line breaks


class Unreadable(UserError):
    """A file that is not a checkpoint, or damaged. The remedy, naming another, is at the end."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.split(". This is an internal miniz error")[0]
