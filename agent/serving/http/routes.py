"""Who answers a path."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

from agent.errors import Forbidden, NotFound, SlotdError, Unavailable
from agent.serving.http import kserve, score, tfserving
from agent.serving.http.exchange import Exchange
from agent.serving.http.messages import TEXT, Request, Response, json_response
from agent.serving.tensorproto import short
from agent.serving.tfserving import no_head, no_label

OPEN = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
"""Paths that need no key: what asks whether a host is well is rarely told secrets."""
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_DIGITS = 18


def check_host(host: str | None) -> None:
    """Whether this is how a port on loopback is called. A page in a browser on this host may call it by a name of its
    own, and would read the answers. Raises Forbidden."""
    name = (host or "").rpartition("@")[2]
    name = name[: name.rindex("]") + 1] if "]" in name else name.partition(":")[0].rstrip(".")
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        if name.lower() not in ("", "localhost", socket.gethostname().lower()):
            raise Forbidden(
                f"this is not {short(name)!r}",
                field="host",
                hint="call it 127.0.0.1 or localhost; or set serving.tls, and keys or client_ca",
            ) from None


class Routes:
    """`ready` says whether health tells that requests are answered; `metrics` gives the text of /metrics."""

    def __init__(self, exchange: Exchange, ready: Callable[[], bool], metrics: Callable[[], str]) -> None:
        self._exchange = exchange
        self._ready = ready
        self._metrics = metrics

    async def answer(self, request: Request) -> Response:
        """Raises SlotdError."""
        head, *rest = request.path.removeprefix("/").split("/")
        if head == "score" and not rest:
            if request.method != "POST":
                return Response(405, (), TEXT, (("allow", "POST"),), text=score.METHOD_TEXT)
            return await score.score(self._exchange, request)
        if head == "v1" and rest[:1] == ["models"] and len(rest) >= 2:
            return await self._v1(request, rest[1:])
        if head == "v2":
            return await self._v2(request, rest)
        if not rest and head in ("healthz", "readyz", "metrics"):
            return _get(request) or self._host(head)
        raise _nothing(request)

    def _host(self, name: str) -> Response:
        if name == "metrics":
            return Response(200, (), _METRICS, text=self._metrics())
        if name == "readyz" and not self._ready():
            return Response(503, (), TEXT, text="not ready\n")
        return Response(200, (), TEXT, text="ok\n")

    # --- TensorFlow Serving -------------------------------------------------------------------------------------------

    async def _v1(self, request: Request, rest: list[str]) -> Response:
        """NAME[/versions/N|/labels/L][:VERB|/metadata]"""
        verb = ""
        if ":" in rest[-1]:
            rest[-1], _, verb = rest[-1].rpartition(":")
        metadata = not verb and len(rest) > 1 and rest[-1] == "metadata" and len(rest) % 2 == 0
        name, *chosen = rest[:-1] if metadata else rest
        if not name:
            raise _nothing(request)
        version = _version(chosen, request)
        if verb:
            if verb in ("classify", "regress"):
                raise no_head()
            if verb != "predict":
                raise _nothing(request)
            if request.method != "POST":
                return _only("POST")
            seat = self._exchange.served(name, version)
            return await tfserving.predict(self._exchange, request, seat, name, version)
        if refusal := _get(request):
            return refusal
        seat = self._exchange.served(name, version)
        return tfserving.metadata(seat) if metadata else tfserving.status(seat)

    # --- KServe -------------------------------------------------------------------------------------------------------

    async def _v2(self, request: Request, rest: list[str]) -> Response:
        if rest and rest[-1] == "":
            rest = rest[:-1]
        if rest[:1] == ["models"] and len(rest) >= 2:
            return await self._v2_model(request, rest[1:])
        if refusal := _get(request):
            return refusal
        if not rest:
            return kserve.server()
        if rest == ["health", "live"]:
            return json_response({"live": True})
        if rest == ["health", "ready"]:
            return json_response({"ready": True}) if self._ready() else json_response({"ready": False}, status=503)
        raise _nothing(request)

    async def _v2_model(self, request: Request, rest: list[str]) -> Response:
        """NAME[/versions/N][/ready|/infer]"""
        name, *rest = rest
        if not name:
            raise _nothing(request)
        version = None
        if rest[:1] == ["versions"] and len(rest) >= 2:
            version, rest = _number(rest[1]), rest[2:]
        if rest == ["infer"]:
            if request.method != "POST":
                return _only("POST")
            return await kserve.infer(self._exchange, request, name, version)
        if rest not in ([], ["ready"]):
            raise _nothing(request)
        if refusal := _get(request):
            return refusal
        if not rest:
            return kserve.model(self._exchange.served(name, version))
        try:
            self._exchange.served(name, version)
            ready = self._ready()
        except (NotFound, Unavailable):
            ready = False
        return json_response({"name": name, "ready": ready}, status=200 if ready else 503)


def _version(chosen: list[str], request: Request) -> int | None:
    if not chosen:
        return None
    if len(chosen) == 2 and chosen[0] == "labels":
        raise no_label(chosen[1], "label")
    if len(chosen) == 2 and chosen[0] == "versions":
        return _number(chosen[1])
    raise _nothing(request)


def _number(text: str) -> int:
    if len(text) > _DIGITS or not (text.isascii() and text.isdigit()):
        raise NotFound(f"no version {short(text)!r} is served", field="version", hint="versions are numbers, such as 1")
    return int(text)


def _get(request: Request) -> Response | None:
    return None if request.method in ("GET", "HEAD") else _only("GET, HEAD")


def _only(methods: str) -> Response:
    return json_response({"error": f"only {methods} is answered here"}, status=405, headers=(("allow", methods),))


def _nothing(request: Request) -> SlotdError:
    return NotFound(
        f"there is nothing at {short(request.path)}",
        field="path",
        hint="/score, /v1/models/NAME:predict, /v2/models/NAME/infer, /healthz, /readyz, /metrics",
    )
