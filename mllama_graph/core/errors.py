"""The errors that end a run with a one-line message, and their exit codes; the error message of one request."""

import re

# The longest message of a request's error, in characters.
MESSAGE_LENGTH = 400


class UserError(Exception):
    """A mistake that the user can fix; the message gives the value, the rule and the remedy. Exit code 2."""


class TooLong(UserError):
    """A request of more tokens than the run takes. `prompt`: ids of its prompt; `new`: new tokens, or None where the
    prompt alone is too long; `most`: of the prompt alone, or of both.
    """

    def __init__(self, message: str, prompt: int, new: int | None, most: int):
        super().__init__(message)
        self.prompt, self.new, self.most = prompt, new, most


class RankFailed(Exception):
    """A rank's process failed; the message gives the rank, the cause and where its stack trace is. Exit code 1."""


class PeerGone(Exception):
    """Another rank did not answer in time: it died, hangs, or has failed with an error of its own. Exit code 1."""


class Interrupted(Exception):
    """The run was stopped from outside (Ctrl-C, SIGTERM); finished requests are kept. Exit code 130."""


class OutputClosed(Exception):
    """The reader of stdout or stderr has ended (`| head`); finished requests are kept. Exit code 141, no message."""


def message_of(error: BaseException) -> str:
    """The message of a request's error: one line of valid text, of limited length and without object addresses."""
    text = str(error) if isinstance(error, UserError) else _explain(error)
    text = re.sub(r"( object)? at 0x[0-9a-fA-F]+", "", text).encode("utf8", "replace").decode()
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= MESSAGE_LENGTH else text[: MESSAGE_LENGTH - 60] + " ... " + text[-55:]


def _explain(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "the request is nested too deeply."
    if isinstance(error, MemoryError):
        return "there is not enough memory to prepare the request."
    return f"the request can't be prepared: {type(error).__name__}: {error}."
