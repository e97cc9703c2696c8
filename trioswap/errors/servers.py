"""The fault of a model server or of a peer, or ours (5xx)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    """The model server could not be started, exited before it was ready, or was late.

    *times* in a row, if that is why it is not tried again for *retry_after* seconds.
    """

    def __init__(
        self, model: str, why: str, *, out_of_memory: bool = False, times: int = 0, retry_after: int = 1
    ) -> None:
        super().__init__(model, f'model "{model}" did not start: {why}; {_what_next(model, times, retry_after)}')
        self.why = why
        self.out_of_memory = out_of_memory
        self.retry_after = retry_after

    def again(self, *, times: int = 0, retry_after: int = 1) -> StartFailed:
        """A fresh instance of the same failure, for the next who asks."""
        return StartFailed(self.model, self.why, out_of_memory=self.out_of_memory, times=times, retry_after=retry_after)


class NothingLeftToStart(StartFailed):
    """It could not even be tried: we, or the machine, lack what every start needs.

    *why* says what that is, and what can be done.
    """

    def __init__(self, model: str, why: str) -> None:
        whose = "that is no fault of the model's, and the next request tries again"
        ModelError.__init__(self, model, f'model "{model}" was not started: {why}; {whose}')
        self.why = why
        self.out_of_memory = False
        self.retry_after = 5  # time for other requests to give something back

    def again(self, *, times: int = 0, retry_after: int = 1) -> NothingLeftToStart:
        """A fresh instance of the same failure, for the next who asks."""
        return NothingLeftToStart(self.model, self.why)


class ModelCrashed(ModelError):
    """The model server ended by itself, *times* in a row, and is not tried again for *retry_after* seconds."""

    def __init__(self, model: str, why: str, *, times: int = 0, retry_after: int = 1) -> None:
        super().__init__(model, f'model "{model}" crashed: {why}; {_what_next(model, times, retry_after)}')
        self.why = why
        self.retry_after = retry_after

    def again(self, *, times: int = 0, retry_after: int = 1) -> ModelCrashed:
        """A fresh instance of the same failure, for the next who asks."""
        return ModelCrashed(self.model, self.why, times=times, retry_after=retry_after)


def _what_next(model: str, times: int, retry_after: int) -> str:
    row = f"that makes {times} failures in a row, " if times > 1 else ""
    pause = f"{row}it is not tried again for {retry_after} s (backoff); " if times else ""
    return f"{pause}its last output is at /logs/stream/{model}"


class ModelUnloaded(ModelError):
    """An operator unloaded the model while the request waited for it."""

    def __init__(self, model: str) -> None:
        super().__init__(
            model, f'model "{model}" was unloaded while this request waited; send it again to load the model'
        )


class ModelStuck(ModelError):
    """A process in the way could not be ended, so its memory cannot be had back.

    It survived SIGKILL, or must not get it (`never_kill`).
    """

    retry_after = 60

    def __init__(self, model: str, stuck: str, pids: Iterable[int] = ()) -> None:
        what = "" if model == stuck else f'model "{model}" cannot start: '
        left = ", ".join(map(str, pids))
        advice = f"; wait until it ends by itself, or end pid {left} by hand" if left else ""
        super().__init__(
            model, f'{what}the process of model "{stuck}" could not be ended and still holds its memory{advice}'
        )


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

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Clients of OpenAI and Anthropic try a 503 again, unless they are told that it is of no use."""
        return [*super().headers(), (b"x-should-retry", b"false")]


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


class SchedulerBroke(TrioswapError):
    """What decides about the model of the request has failed and begins anew; the log has the traceback."""

    status = 503
    retry_after = 1

    def __init__(self) -> None:
        super().__init__(
            "the scheduler of trioswap broke while the request waited, and has begun anew; that is a fault of trioswap,"
            " and its log says more; send the request again"
        )


class WaitTooLong(TrioswapError):
    """The request has waited longer than any should: something of ours is broken, and the log says more."""

    status = 503
    retry_after = 1

    def __init__(self, waited: float) -> None:
        super().__init__(
            f"the request waited {waited:.0f} s, which is longer than it ever should; that is a fault of trioswap, and "
            "its log says more; send the request again"
        )


class NotReady(TrioswapError):
    """The daemon cannot be counted on now; *reasons* are in general words, and so long ago it looked at itself."""

    status = 503
    retry_after = 5

    def __init__(self, reasons: Sequence[str], checked_ms_ago: int | None) -> None:
        super().__init__(f"trioswap is not ready: {'; '.join(reasons)}")
        self.checked_ms_ago = checked_ms_ago

    def openai_body(self) -> dict[str, Any]:
        """The error, and what the answer says when all is well."""
        return {"ready": False, "checked_ms_ago": self.checked_ms_ago, **super().openai_body()}


class QueueFull(TrioswapError):
    """So many requests wait already that no more are taken."""

    status = 503

    def __init__(self, limit: int, retry_after: int) -> None:
        super().__init__(f"{limit} requests wait already (max_queue); try again in {retry_after} s")
        self.retry_after = retry_after
