"""The errors a user may meet. Each says what was given, what was expected and what to do next."""

from __future__ import annotations


class DeploySparseError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        given: what was found, with the offending name or value in it.
        expected: what would have been accepted.
        fix: the next step, a command where there is one.
    """

    exit_code = 2

    def __init__(self, given: str, *, expected: str, fix: str) -> None:
        self.given, self.expected, self.fix = given, expected, fix
        super().__init__(f"{given}\n  expected: {expected}\n  next step: {fix}")


class ConfigError(DeploySparseError):
    """A recipe, config, key, value or target that does not exist or is out of range."""


class ArtifactError(DeploySparseError):
    """A file that is missing, truncated, altered, of another kind, or cannot be written."""


class TicketError(DeploySparseError):
    """Masks or weights that do not fit each other, or the network they are applied to."""


class SurgeryError(DeploySparseError):
    """A network that cannot be traced, or channels that cannot be removed exactly."""


class ExportError(DeploySparseError):
    """A module that does not become an ONNX graph computing the same function."""


class BuildError(DeploySparseError):
    """An ONNX graph that does not compile for a target."""


class EngineError(DeploySparseError):
    """An engine that cannot be loaded or run here, or inputs it does not accept."""


class MissingDependencyError(DeploySparseError):
    """An optional library that the asked-for target needs is not installed."""


class RunError(DeploySparseError):
    """A run folder that cannot be started or continued."""


class Interrupted(DeploySparseError):
    """SIGINT or SIGTERM arrived; everything up to ``given`` is saved.

    ``exit_code`` follows the shell's convention: 128 plus the signal's number.
    """

    def __init__(self, given: str, *, signal_number: int, fix: str) -> None:
        super().__init__(given, expected="an undisturbed run", fix=fix)
        self.exit_code = 128 + signal_number


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """``"did you mean 'x'? "`` when a known name is close to ``name``, otherwise an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? " if close else ""
