"""TLS for the ports: a certificate that is replaced while slotd runs, and clients' certificates where they are wanted.

The files are looked at every ten seconds; what is wrong with new ones changes nothing but is told, and so is the end of
a certificate that comes near.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path

import structlog
from cryptography import x509

from agent.config import TlsConfig
from agent.errors import InvalidConfig
from agent.health.issues import Issues

log = structlog.get_logger(__name__)

EVERY = 10.0
"""Seconds between two looks at the files."""
HANDSHAKE = 5.0
"""Seconds that a client has for it."""
_DAY = 86400.0
_NEAR = ((1, "critical"), (7, "error"), (30, "warning"))
"""Days before the end, and how grave that is."""
PROTOCOLS = ("h2", "http/1.1")
_FILES, _END = "serving-tls", "serving-tls-end"

_Mark = tuple[tuple[int, ...] | None, ...]


class Tls:
    """`load` first, which raises; then `context` for each port, and `refresh` every EVERY seconds."""

    def __init__(self, config: TlsConfig, issues: Issues) -> None:
        self._config = config
        self._issues = issues
        self._now: dict[str, ssl.SSLContext] = {}
        self._seen: _Mark = ()
        self._end = 0.0

    async def load(self) -> None:
        """Reads the files. Raises InvalidConfig naming the one at fault."""
        self._seen, self._end, self._now = await asyncio.to_thread(self._load)
        self._tell_end()

    def context(self, protocol: str) -> ssl.SSLContext:
        """For a port that speaks `protocol` (as ALPN names it); always with the files that were read last."""
        context = self._now[protocol]

        def newest(handshake: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            handshake.context = self._now[protocol]

        context.sni_callback = newest  # called for each client, whether or not it names a server
        return context

    async def refresh(self) -> None:
        """Reads the files again if they are others."""
        mark = await asyncio.to_thread(self._mark)
        if mark != self._seen:
            self._seen = mark  # whatever comes of it: another look at the same files tells nothing new
            try:
                self._seen, self._end, self._now = await asyncio.to_thread(self._load)
            except InvalidConfig as fault:
                self._issues.raise_(_FILES, "error", f"{fault}: the certificate from before is used on", fault.hint)
            else:
                log.info("certificate_read", certificate=str(self._config.certificate))
                self._issues.clear(_FILES)
        self._tell_end()

    def _tell_end(self) -> None:
        left = (self._end - time.time()) / _DAY
        for days, severity in _NEAR:
            if left <= days:
                text = f"has {max(0, int(left))} days left" if left > 0 else "is over: clients refuse it"
                hint = f"put a new one at {self._config.certificate}; it is taken without a restart"
                self._issues.raise_(_END, severity, f"{self._config.certificate} {text}", hint)  # type: ignore[arg-type]
                return
        self._issues.clear(_END)

    def _load(self) -> tuple[_Mark, float, dict[str, ssl.SSLContext]]:
        mark = self._mark()  # before: what is written meanwhile is another mark
        made = {protocol: self._made(protocol) for protocol in PROTOCOLS}
        path = self._config.certificate
        assert path is not None
        try:
            end = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.timestamp()
        except (OSError, ValueError) as error:
            raise _fault("certificate", path, str(error)) from None
        return mark, end, made

    def _made(self, protocol: str) -> ssl.SSLContext:
        config = self._config
        assert config.certificate is not None and config.key is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols([protocol])
        for name, path in (("certificate", config.certificate), ("key", config.key), ("client_ca", config.client_ca)):
            if path is None:
                continue
            try:
                mode = path.stat().st_mode
                path.read_bytes()
            except OSError as error:
                raise _fault(name, path, error.strerror or "cannot be read") from None
            if name == "key" and mode & 0o007:
                raise InvalidConfig(f"{path} is open to everybody", field="serving.tls.key", hint=f"chmod o= {path}")
        try:
            context.load_cert_chain(config.certificate, config.key, password=_no_password)
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise _fault("key", config.key, f"does not go with {config.certificate}: {error}") from None
        if config.client_ca is not None:
            try:
                context.load_verify_locations(config.client_ca)
            except OSError as error:
                raise _fault("client_ca", config.client_ca, str(error)) from None
            context.verify_mode = ssl.CERT_REQUIRED
            # Who was let in must show a certificate again the next time: its CA may be gone by then.
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0
        return context

    def _mark(self) -> _Mark:
        return tuple(_mark(path) for path in (self._config.certificate, self._config.key, self._config.client_ca))


def _no_password() -> str:
    raise ValueError("the key has a password, for which nobody can be asked")


def _mark(path: Path | None) -> tuple[int, ...] | None:
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return (
        (found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode, found.st_ctime_ns)
        if found is not None
        else None
    )


def _fault(name: str, path: Path, text: str) -> InvalidConfig:
    return InvalidConfig(f"{path}: {text}", field=f"serving.tls.{name}", hint="a file in PEM form that slotd may read")
