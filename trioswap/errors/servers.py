"""The fault of a model server or of a peer, or ours (5xx)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trioswap.errors.base import TrioswapError


class ModelError(TrioswapError):
    """A model server failed, or is not to be had now."""

    status = 503
    retry_after: int | None = 1

    def __init__(self, model: str, message: str) -> None:
        super().__init__(message)
        self.model = model


class StartFailed(ModelError):
    """The model server could not be started, exited before it was ready, or was late."""

    def __init__(self, model: str, why: str, *, out_of_memory: bool = False) -> None:
        super().__init__(model, f'model "{model}" did not start: {why}; its last output is at /logs/stream/{model}')
        self.why = why
        self.out_of_memory = out_of_memory

    def again(self) -> StartFailed:
        """A fresh instance of the same failure, for the next waiter."""
        return StartFailed(self.model, self.why, out_of_memory=self.out_of_memory)


class ModelUnloaded(ModelError):
    """An operator unloaded the model while the request waited for it."""

    def __init__(self, model: str) -> None:
        super().__init__(
            model, f'model "{model}" was unloaded while this request waited; send it again to load the model'
        )


class ModelStuck(ModelError):
    """A process in the way survived SIGKILL, so its memory cannot be had back."""

    retry_after = 60

    def __init__(self, model: str, stuck: str) -> None:
        what = "" if model == stuck else f'model "{model}" cannot start: '
        super().__init__(model, f'{what}the process of model "{stuck}" survived SIGKILL and still holds its memory')


class MemoryLent(ModelError):
    """The memory that the model needs is lent to a program that is not ours."""

    retry_after = 60

    def __init__(self, model: str, holder: str) -> None:
        super().__init__(model, f'model "{model}" cannot start: the memory it needs is held by {holder}')


class NotToBeHad(ModelError):
    """Memory cannot be lent, now or ever."""

    retry_after = 60

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, f"the memory for {name} is not to be had: {why}")


class MemoryTaken(ModelError):
    """Programs that are not ours use the memory that the model needs."""

    retry_after = 60

    def __init__(self, model: str) -> None:
        super().__init__(model, f'model "{model}" cannot start: other programs use the memory it needs')


class DoesNotFit(ModelError):
    """The model needs more memory than there is."""

    retry_after = None

    def __init__(self, model: str) -> None:
        super().__init__(
            model,
            f'model "{model}" needs more memory than there is for models, even alone; see `trioswap plan {model}`',
        )


class LeaseCut(ModelError):
    """The request was being served and lost its model: drain deadline, operator, or shutdown."""

    def __init__(self, model: str, why: str) -> None:
        super().__init__(model, f'the request was cut off while model "{model}" served it: {why}')


class UpstreamFailed(ModelError):
    """The model server broke the connection or spoke no HTTP.

    `before_first_byte` says that nothing of an answer had come yet: only then may
    the request be sent again (design, I14).
    """

    status = 502
    retry_after = None

    def __init__(self, model: str, why: str, *, before_first_byte: bool = False) -> None:
        super().__init__(model, f'model "{model}" failed while it handled the request: {why}')
        self.why, self.before_first_byte = why, before_first_byte


class UpstreamTimedOut(UpstreamFailed):
    """The model server took no connection, or did not begin its answer, in the time that `timeouts` gives it."""

    status = 504


class QueueTimedOut(ModelError):
    """The request waited as long as it may."""

    def __init__(self, model: str, waited: float, retry_after: int) -> None:
        super().__init__(
            model,
            f'the request waited {waited:g} s for model "{model}", which is as long as it may (queue_timeout)',
        )
        self.retry_after = retry_after


class StillLoading(ModelError):
    """The client does not want to wait any longer, and is told what is going on."""

    def __init__(self, model: str, progress: Mapping[str, Any], retry_after: int) -> None:
        super().__init__(model, f'model "{model}" is not ready yet; try again in about {retry_after} s')
        self.retry_after = retry_after
        self.progress = progress

    def openai_body(self) -> dict[str, Any]:
        """The error, and what is going on under `loading`."""
        return {**super().openai_body(), "loading": dict(self.progress)}

    def anthropic_body(self) -> dict[str, Any]:
        """The same in Anthropic's shape."""
        return {**super().anthropic_body(), "loading": dict(self.progress)}


# ---- a peer's fault -------------------------------------------------------------------


class PeerFailed(ModelError):
    """A peer cannot be reached, or broke the connection.

    `before_first_byte` as for `UpstreamFailed`.
    """

    status = 502
    retry_after = None

    def __init__(self, peer: str, why: str, *, before_first_byte: bool = False) -> None:
        super().__init__(peer, f'peer "{peer}" failed: {why}')
        self.before_first_byte = before_first_byte


class PeerTimedOut(PeerFailed):
    """A peer did not begin its answer in time."""

    status = 504


# ---- ours -----------------------------------------------------------------------------


class ShuttingDown(TrioswapError):
    """The daemon takes no new work."""

    status = 503
    retry_after = 5

    def __init__(self) -> None:
        super().__init__("trioswap is shutting down; send the request again in a moment")


class InternalError(TrioswapError):
    """Something of ours broke; the log has the traceback under the request id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"internal error; the log of trioswap says more about request {request_id}")


class QueueFull(TrioswapError):
    """So many requests wait already that no more are taken."""

    status = 503

    def __init__(self, limit: int, retry_after: int) -> None:
        super().__init__(f"{limit} requests wait already (max_queue); try again in {retry_after} s")
        self.retry_after = retry_after
