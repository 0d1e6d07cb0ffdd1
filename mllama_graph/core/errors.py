"""The errors that end a run with a one-line message, and their exit codes."""


class UserError(Exception):
    """A mistake that the user can fix; the message gives the value, the rule and the remedy. Exit code 2."""


class RankFailed(Exception):
    """A rank's process failed; the message gives the rank, the cause and where its stack trace is. Exit code 1."""


class PeerGone(Exception):
    """Another rank did not answer in time: it died, hangs, or has failed with an error of its own. Exit code 1."""


class Interrupted(Exception):
    """The run was stopped from outside (Ctrl-C, SIGTERM); finished requests are kept. Exit code 130."""
