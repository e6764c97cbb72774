"""One error class per boundary; each message says what was expected, what came, and what to do."""


def printable(text: str) -> str:
    """``text`` for a terminal, which obeys no control character of it but a new line and a tab."""
    return "".join(one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in text)


class NorthError(Exception):
    """Base of every error this package raises on purpose. A message may quote what a stranger wrote."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(NorthError, ValueError):
    """A setting that cannot work: the key, what was expected, what came."""


class PromptTooLongError(ConfigError):
    """The prompt of one task does not fit in the context: RL drops the task's groups, and goes on with the others."""


class CheckpointError(NorthError):
    """A checkpoint that is missing, incomplete or of another shape."""


class TokenizerError(NorthError, ValueError):
    """A tokenizer that does not fit the model, the chat format or the sampler."""


class DataError(NorthError, ValueError):
    """A sample or file that cannot be used; names file and line."""


class RetellingError(NorthError):
    """A trajectory that cannot be told in another harness's words; counted under ``reason``, and left as it is."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TaskError(NorthError):
    """A task directory that is malformed."""


class InvalidActionError(NorthError):
    """The model's turn is not a valid action. This is the model's failure: it is trained on, and it scores 0 unless the
    harness lets the model try again. ``num_calls`` well-formed calls were in the turn; ids count on from there."""

    def __init__(self, message: str, num_calls: int = 0) -> None:
        super().__init__(message)
        self.num_calls = num_calls


class TreeTooLargeError(NorthError):
    """An attempt left more bytes or files than may be copied. This is the model's failure: it scores 0."""


class UploadRefusedError(NorthError):
    """Files could not be put into a sandbox for what is in there already, or for want of room. What is in there may be
    the model's failure."""


class InfrastructureError(NorthError):
    """Something that is not the model's doing failed. Never a reward: retried, then dropped with its reason."""


class AttemptError(InfrastructureError):
    """What an attempt did could not be carried out, and no other error says why: its own making, or a bug. It repeats
    with the seed. Where it does, the attempt scores 0 (``AttemptRunner.run``)."""


class SandboxError(InfrastructureError):
    """A sandbox could not start or died."""


class SandboxUnavailableError(SandboxError):
    """This machine cannot isolate commands; nothing is run without isolation."""


class SamplerError(InfrastructureError):
    """The sampler did not answer, or answered what it must not (non-finite log-probabilities)."""


class NonFiniteError(SamplerError):
    """The sampler's log-probabilities are not finite: most likely its weights are not."""


class SidecarError(SamplerError):
    """The vLLM process could not start or is dead."""


class WeightPushError(InfrastructureError):
    """A weight push did not complete: the sampler must not be used until one does."""


class VerifierError(InfrastructureError):
    """A verifier raised, hung or returned something that is not a number of its range."""


class RewardFileError(VerifierError, AttemptError):
    """A task's tests ended without a usable reward file: the attempt's making, or the task's, which its solution shows
    (``tasks check --run``)."""


class QueueError(NorthError):
    """The rollout queue was used out of order (unknown group, completed twice)."""


class TrainingError(NorthError):
    """A loss or gradient that is not finite, or a batch older than its bound: the optimizer step was not taken."""
