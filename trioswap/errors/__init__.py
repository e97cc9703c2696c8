"""Every error trioswap raises, whose fault it is, and what the client is told.

    TrioswapError
     +- ConfigError, Misuse ...    people: the user's mistake; the command line prints it and exits with 2
     +- CannotListen ...           people: the world's; the command line exits with 1
     +- RequestError               clients: the client's fault (4xx)
     +- ModelError                 servers: the fault of a model server or a peer (5xx)
     +- ShuttingDown ...           servers: ours (503, 500)
    IllegalTransition              a bug of ours, never sent to anyone

Make a new instance for each ticket: a shared one collects everybody's traceback.
"""

from trioswap.errors.base import (
    IllegalTransition,
    TrioswapError,
)
from trioswap.errors.clients import (
    AmbiguousLength,
    BadRequest,
    BodyTooLarge,
    Cancelled,
    Forbidden,
    ForeignOrigin,
    MissingModel,
    NoBudget,
    NoSuchRequest,
    NotLoaded,
    NotWaiting,
    PinnedToNobody,
    RequestError,
    StorageFull,
    TooManyRequests,
    Unauthorized,
    UnknownModel,
    UnknownPath,
    UnknownProfile,
    WrongMethod,
)
from trioswap.errors.people import (
    BadCertificate,
    CannotListen,
    CannotWrite,
    ConfigError,
    DaemonRefused,
    DaemonUnreachable,
    InitFailed,
    LlamaExtraMissing,
    Misuse,
)
from trioswap.errors.servers import (
    DoesNotFit,
    InternalError,
    LeaseCut,
    MemoryLent,
    MemoryTaken,
    ModelError,
    ModelStuck,
    ModelUnloaded,
    NotToBeHad,
    PeerFailed,
    PeerTimedOut,
    QueueFull,
    QueueTimedOut,
    ShuttingDown,
    StartFailed,
    StillLoading,
    UpstreamFailed,
    UpstreamTimedOut,
)

__all__ = [
    "AmbiguousLength",
    "BadCertificate",
    "BadRequest",
    "BodyTooLarge",
    "Cancelled",
    "CannotListen",
    "CannotWrite",
    "ConfigError",
    "DaemonRefused",
    "DaemonUnreachable",
    "DoesNotFit",
    "Forbidden",
    "ForeignOrigin",
    "IllegalTransition",
    "InitFailed",
    "InternalError",
    "LeaseCut",
    "LlamaExtraMissing",
    "MemoryLent",
    "MemoryTaken",
    "MissingModel",
    "Misuse",
    "ModelError",
    "ModelStuck",
    "ModelUnloaded",
    "NoBudget",
    "NoSuchRequest",
    "NotLoaded",
    "NotToBeHad",
    "NotWaiting",
    "PeerFailed",
    "PeerTimedOut",
    "PinnedToNobody",
    "QueueFull",
    "QueueTimedOut",
    "RequestError",
    "ShuttingDown",
    "StartFailed",
    "StillLoading",
    "StorageFull",
    "TooManyRequests",
    "TrioswapError",
    "Unauthorized",
    "UnknownModel",
    "UnknownPath",
    "UnknownProfile",
    "UpstreamFailed",
    "UpstreamTimedOut",
    "WrongMethod",
]
