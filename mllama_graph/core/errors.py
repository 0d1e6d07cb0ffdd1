"""The errors that end a run with one line, and what each of them means for its exit code."""


class UserError(Exception):
    """A mistake that a user can mend: the message gives the value, the rule and the remedy. Exit code 2."""


class RankFailed(Exception):
    """A rank's process failed; the message says which one, how, and where its stack is. Exit code 1."""


class PeerGone(Exception):
    """Another rank did not answer in time: it died, hangs, or has reported its own failure elsewhere. Exit code 1."""


class Interrupted(Exception):
    """The run was stopped from outside (Ctrl-C, SIGTERM); finished requests are kept. Exit code 130."""
