"""Errors that say whose fault they are, and survive pickling between processes.

Every error carries one finished message (what happened, the value, the knob, the way out), so that it can be
printed as it stands. `ElasticTrainError.fault` is the attribution that reports and exit codes use.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Attribution = Literal["user", "data", "infrastructure", "internal"]


class ElasticTrainError(Exception):
    """Base of all errors this project raises on purpose."""

    fault: ClassVar[Attribution] = "internal"
    exit_code: ClassVar[int] = 1


class ConfigError(ElasticTrainError):
    """The configuration asks for something that can't be: found before anything starts."""

    fault = "user"
    exit_code = 2


class RunConflictError(ConfigError):
    """The run exists and this config can't continue it, or another process is running it now."""

    exit_code = 3


class UserCodeError(ElasticTrainError):
    """The model or data code raised; the message holds the first rank's traceback."""

    fault = "user"
    exit_code = 4


class DataError(ElasticTrainError):
    """The corpus or its token shards are missing, empty or damaged."""

    fault = "data"
    exit_code = 2


class BadLossError(ElasticTrainError):
    """A loss or gradient is no number, or the loss spiked, and the config says to stop then."""

    fault = "user"
    exit_code = 4


class InfrastructureError(ElasticTrainError):
    """The cluster can't give what the run needs: nodes, ports, disk, memory."""

    fault = "infrastructure"
    exit_code = 5


class CheckpointError(ElasticTrainError):
    """A stored or remembered state is incomplete, damaged or refused; never loaded."""

    fault = "infrastructure"
    exit_code = 6


class CheckpointUnreadableError(CheckpointError):
    """The storage failed while a checkpoint was read: the checkpoint itself may be sound."""


class StaleGenerationError(ElasticTrainError):
    """A message, snapshot or write of a generation that has been fenced."""

    fault = "internal"


class StateCorruptedError(ElasticTrainError):
    """Some rank's memory changed by itself; found before the change got into an update."""

    fault = "infrastructure"

    def __init__(self, problem: str, ranks: tuple[int, ...], trusted_step: int) -> None:
        super().__init__(problem, ranks, trusted_step)
        self.problem = problem
        self.ranks = ranks
        """Whose memory; empty when it can't be told."""
        self.trusted_step = trusted_step
        """The newest step whose state can be trusted."""

    def __str__(self) -> str:
        return self.problem


class PeerLostError(ElasticTrainError):
    """A collective broke because another rank went away; never the first cause of a failure."""

    fault = "infrastructure"


def in_a_line(error: BaseException) -> tuple[str, str]:
    """What went wrong in one line, and the traceback of the user's code where the message brings one."""
    told, _, last = str(error).strip().rpartition("\n\n")
    if isinstance(error, UserCodeError) and told:
        return f"{told.splitlines()[-1]} ({last.splitlines()[0]})", told
    return f"{type(error).__name__}: {error}".splitlines()[0], ""
