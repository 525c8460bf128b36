"""Errors that reach a user as one line: what is wrong, where, and the mend. A traceback is a bug.

Every class is also a built-in one, so library users may catch what they already know.
"""


class GraftError(Exception):
    """Base of all errors meant for the user; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 2


class ConfigError(GraftError, ValueError):
    """A recipe, an override or a command-line option is wrong."""


class DataError(GraftError, ValueError):
    """Input rows, corpora or shards cannot be used."""


class ArtifactError(GraftError, RuntimeError):
    """An artifact is missing, incomplete or altered."""


class Unreadable(ArtifactError):
    """What the file system does not give now, which says nothing of what it holds: worth another look."""


class CredentialError(GraftError, PermissionError):
    """A key that only the environment may hold is absent or refused."""


class TrainError(GraftError, RuntimeError):
    """Training cannot start or go on."""


class Preempted(TrainError):
    """Training was asked to leave and saved a checkpoint: start the same command again. 75 is EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


class NodeFault(TrainError):
    """A process of the run, or its machine, failed or was lost: worth starting the same command again. 69 is EX_UNAVAILABLE."""

    exit_code = 69


class ServeError(GraftError, RuntimeError):
    """The server cannot start or cannot answer."""
