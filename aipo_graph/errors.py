"""Every error that a user can meet. Each message is one line: the value, the place, the remedy."""

from importlib import metadata


class AipoError(Exception):
    """An expected failure. The commands print its one line and exit with code 2."""


class ConfigError(AipoError):
    """The configuration, a path in it, or a run directory cannot be used."""


class TaskError(AipoError):
    """A data set or a grader failed. A grader's own fault gives no score: the trace is dropped and counted."""


class EngineError(AipoError):
    """The engine could not sample: context too long, server gone, weights not loadable."""


class ContextError(EngineError):
    """A prompt fills the model's context. In the middle of a trace this is the policy's own doing: the trace ends for length."""


class AgentError(AipoError):
    """A helper agent failed after its retries. The trace carries zero gradient and is counted."""


class RequestError(AgentError):
    """A request that the policy made too long for its helper. Its own doing: the trace ends as `budget`, and is trained on."""


class ToolError(AipoError):
    """A tool refused or failed. Its text is shown to the agent that called it."""


class GraphError(AipoError):
    """A bug in a user's graph: lost, edited or invented tokens. Ends the run; never counted as a failed trace."""


class LostError(AipoError):
    """A process of the learner died. In a run all of them start again, and it goes on from its last checkpoint."""


class TrainError(AipoError):
    """Training cannot go on: too many failed traces, nothing to learn from, or several bad steps in a row."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, for a line of ours."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def install(extra: str) -> str:
    """The command that installs what an extra needs, wherever this package came from: a clone, a wheel or an index.

    >>> install("peft")
    "pip install 'peft<0.22,>=0.21'"
    """
    try:
        lines = [line.partition(";") for line in metadata.requires("aipo-graph") or ()]
    except metadata.PackageNotFoundError:  # run from a clone, uninstalled
        return f"pip install '.[{extra}]'"
    return " ".join(["pip install", *(f"'{what.strip()}'" for what, _, where in lines if f'extra == "{extra}"' in where.replace("'", '"'))])
