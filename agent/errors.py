"""Every error that slotd tells somebody about.

Each class maps once to a gRPC status, an HTTP status and an exit code (sysexits.h); MQTT and the admin socket carry
`code`, `message`, `hint` and `field`. A message says what is wrong and where; a hint says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar


class SlotdError(Exception):
    """Something inside slotd went wrong that nobody foresaw; the log has the details."""

    code: ClassVar[str] = "INTERNAL"
    grpc: ClassVar[str] = "INTERNAL"
    http: ClassVar[int] = 500
    exit: ClassVar[int] = 70

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        field: str | None = None,
        retry_after: float | None = None,
        code: str | None = None,
    ) -> None:
        """`field` names the input at fault (a config path, a tensor, a file); `retry_after` is in seconds."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.field = field
        self.retry_after = retry_after
        if code is not None:
            self.code = code  # type: ignore[misc]  # a narrower word within the same class

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message

    def as_dict(self) -> dict[str, Any]:
        """The error as it goes over MQTT, the admin socket and from a child to the agent."""
        document: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.code != type(self).code:
            document["category"] = type(self).code
        for key in ("hint", "field", "retry_after"):
            value = getattr(self, key)
            if value is not None:
                document[key] = value
        return document

    def forget_frames(self) -> None:
        """For an error that is kept: its traceback would keep alive all that its frames held, executors and tensors."""
        self.__traceback__ = self.__context__ = self.__cause__ = None


# --- what somebody sent us -------------------------------------------------------------------------------------------


class InvalidInput(SlotdError):
    """A request, command or file is malformed; sending it again cannot help."""

    code, grpc, http, exit = "INVALID_ARGUMENT", "INVALID_ARGUMENT", 400, 65


class InvalidConfig(InvalidInput):
    """The configuration cannot be used. `faults`: each field at fault and why; the message has the first."""

    code, exit = "CONFIG_INVALID", 78

    def __init__(
        self,
        message: str,
        *,
        faults: Iterable[tuple[str, str]] = (),
        hint: str | None = None,
        field: str | None = None,
        retry_after: float | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, field=field, retry_after=retry_after, code=code)
        self.faults = tuple(faults) or ((field or "", message),)

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"faults": [{"field": field, "message": text} for field, text in self.faults]}


class InvalidModel(InvalidInput):
    """An image's content is not a model that slotd can run."""

    code = "MODEL_INVALID"


class InvalidImage(InvalidInput):
    """An image, a layer or an archive is malformed, hostile or not what its digest says."""

    code = "IMAGE_INVALID"


class NotFound(SlotdError):
    """The thing that was named does not exist."""

    code, grpc, http, exit = "NOT_FOUND", "NOT_FOUND", 404, 66


class Unimplemented(SlotdError):
    """slotd does not have what was called."""

    code, grpc, http, exit = "UNIMPLEMENTED", "UNIMPLEMENTED", 501, 64


class Unauthenticated(SlotdError):
    """No key, or not the right one."""

    code, grpc, http, exit = "UNAUTHENTICATED", "UNAUTHENTICATED", 401, 77


class Forbidden(SlotdError):
    """The caller may not do this."""

    code, grpc, http, exit = "FORBIDDEN", "PERMISSION_DENIED", 403, 77


class CommandRefused(SlotdError):
    """A command was not run: retained, expired, without an expiry, repeated while it runs, or interrupted."""

    code, grpc, http, exit = "COMMAND_REFUSED", "FAILED_PRECONDITION", 409, 75


# --- what cannot be done now -----------------------------------------------------------------------------------------


class Unavailable(SlotdError):
    """Nothing can answer at the moment; worth trying again."""

    code, grpc, http, exit = "UNAVAILABLE", "UNAVAILABLE", 503, 69


class Overloaded(SlotdError):
    """More work than the host can do in time; shed at admission."""

    code, grpc, http, exit = "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED", 429, 75


class Oversize(Overloaded):
    """More bytes than one request may have, whatever else there is to do."""

    code, http = "TOO_LARGE", 413


class DeadlineExceeded(SlotdError):
    """The time for it is over; it was not run late."""

    code, grpc, http, exit = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", 504, 75


class RequestTimeout(DeadlineExceeded):
    """A client did not send its request in time."""

    code, http = "REQUEST_TIMEOUT", 408


class Cancelled(SlotdError):
    """Somebody called it off."""

    code, grpc, http, exit = "CANCELLED", "CANCELLED", 499, 75


class Superseded(Cancelled):
    """A newer wish took its place."""

    code = "SUPERSEDED"


class Interrupted(SlotdError):
    """It was cut off by a crash, a power cut or a stop."""

    code, grpc, http, exit = "INTERRUPTED", "ABORTED", 409, 75


class Refused(SlotdError):
    """A deployment was refused before anything was touched; the running model is as it was."""

    code, grpc, http, exit = "REFUSED", "FAILED_PRECONDITION", 409, 65


class Conflict(SlotdError):
    """Another slotd holds the state, the port or the slot."""

    code, grpc, http, exit = "CONFLICT", "ALREADY_EXISTS", 409, 73


# --- what broke ------------------------------------------------------------------------------------------------------


class RegistryError(SlotdError):
    """The registry answered with an error, or not at all."""

    code, grpc, http, exit = "REGISTRY", "UNAVAILABLE", 502, 69


class RegistryDenied(RegistryError):
    """The registry wants other credentials; asking again cannot help."""

    code, grpc, exit = "REGISTRY_DENIED", "FAILED_PRECONDITION", 77


class RegistryRefused(RegistryError):
    """The registry, or the way to it, will not serve this however often it is asked."""

    code, grpc = "REGISTRY_REFUSED", "FAILED_PRECONDITION"


class PullerDied(SlotdError):
    """The child process that fetches and unpacks images ended before its work was done; worth trying again."""

    code, grpc, http, exit = "PULLER_DIED", "UNAVAILABLE", 503, 69


class StorageError(SlotdError):
    """The disk is full, read-only or broken."""

    code, grpc, http, exit = "STORAGE", "INTERNAL", 507, 74


class SlotError(SlotdError):
    """The slot, its driver or its runtime failed; the code (see SLOT_CODES) says how."""

    code, grpc, http, exit = "SLOT_FAILED", "UNAVAILABLE", 503, 69


class ProofFailed(SlotError):
    """The slot (or the CPU twin) computes something else than the model should."""

    code = "PROOF_FAILED"


class ExecutorError(SlotdError):
    """A child process could not load a model or run a request."""

    code = "EXECUTOR_FAILED"


class ExecutorDied(ExecutorError):
    """A child process ended with work in hand."""

    code, grpc, http = "EXECUTOR_DIED", "UNAVAILABLE", 503


class Poison(ExecutorError):
    """This request ended every executor that ran it; it will not be tried again."""

    code, grpc = "POISON", "INTERNAL"


def revive(document: dict[str, Any]) -> SlotdError:
    """The error that `as_dict` described, as the nearest class; used for what a child process or the daemon tells."""
    code = str(document.get("code", "INTERNAL"))
    category = str(document.get("category", code))
    kind = _BY_CODE.get(category) or (SlotError if code in SLOT_CODES else ExecutorError)
    retry = document.get("retry_after")
    error = kind(
        str(document.get("message", "no message")),
        hint=document.get("hint"),
        field=document.get("field"),
        retry_after=float(retry) if retry is not None else None,
        code=code,
    )
    if isinstance(error, InvalidConfig) and document.get("faults"):
        error.faults = tuple((str(one.get("field", "")), str(one.get("message", ""))) for one in document["faults"])
    return error


SLOT_CODES = frozenset(
    {
        "PROGRAM_FAILED",
        "PROGRAM_TIMEOUT",
        "WRONG_ACCELERATOR",
        "INCOMPATIBLE_BITSTREAM",
        "DEVICE_STUCK",
        "DEVICE_BUSY",
        "DEVICE_ABSENT",
        "DEVICE_HUNG",
        "NO_RUNTIME",
        "OVER_TEMPERATURE",
    }
)


def _tree(kind: type[SlotdError]) -> dict[str, type[SlotdError]]:
    found = {kind.code: kind}
    for child in kind.__subclasses__():
        found |= _tree(child)
    return found


_BY_CODE = _tree(SlotdError)
