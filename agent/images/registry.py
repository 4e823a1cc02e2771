"""A client for one repository of an OCI registry. Synchronous: it runs in the puller child.

What a registry says is only a claim: every byte is counted and hashed here. Passing faults (no answer, 429, 5xx, a cut
connection) are tried again, a bounded number of times; what is permanent ends at once. Raises RegistryError (passing,
tries used up), RegistryDenied (credentials), RegistryRefused (permanent), NotFound, InvalidImage.
"""

from __future__ import annotations

import email.utils
import json
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from agent import __version__
from agent.errors import InvalidImage, NotFound, RegistryDenied, RegistryError, RegistryRefused
from agent.images.blobs import Incoming
from agent.images.credentials import Credentials, read_credentials
from agent.images.manifest import ACCEPT, MAX_DOCUMENT, digest_of
from agent.images.reference import DIGEST, Reference

CHUNK = 1 << 20
CONNECT_TIMEOUT = 10.0
BACKOFF_FIRST, BACKOFF_MAX = 0.5, 30.0
RETRY_AFTER_MAX = 120.0  # a registry that asks for more is told about, not waited for
ENOUGH = 1 << 20  # bytes that make a cut connection count as progress
MAX_REDIRECTS = 5
MAX_EXPLANATION = 8 << 10
MAX_TOKEN = 64 << 10
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RANGE = re.compile(r"bytes (\d{1,16})-(\d{1,16})/(\d{1,16}|\*)")


@contextmanager
def open_registry(
    reference: Reference, *, plain: bool, credentials: Path | None, timeout: float, retries: int
) -> Iterator[Registry]:
    """The repository that `reference` names. `plain`: HTTP without TLS. `timeout` (s): how long it may be silent."""
    assert reference.host is not None
    found = read_credentials(credentials, reference.host) if credentials else None
    url = httpx.URL(f"{'http' if plain else 'https'}://{reference.host}")
    with httpx.Client(
        # The host's own CAs, as for every other program on it (httpx would take a list of its own).
        verify=False if plain else ssl.create_default_context(),
        timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT)),
        follow_redirects=False,
        trust_env=url.host not in ("localhost", "127.0.0.1", "::1"),  # no proxy leads to this host
        # Compressed answers would be expanded before they could be counted.
        headers={"User-Agent": f"slotd/{__version__}", "Accept-Encoding": "identity"},
    ) as client:
        yield Registry(client, url, reference.name, found, retries)


class Registry:
    """One repository."""

    def __init__(
        self, client: httpx.Client, url: httpx.URL, name: str, credentials: Credentials | None, retries: int
    ) -> None:
        self._client = client
        self._url = url
        self._name = name
        self._credentials = credentials
        self._retries = retries
        self._authorization: str | None = None
        self._shown = f"{url.netloc.decode()}/{name}"

    # --- what the puller asks for ------------------------------------------------------------------------------------

    def manifest(self, which: str) -> tuple[bytes, str | None, str]:
        """The manifest or index with this tag or digest: (bytes, content type, digest of the bytes)."""
        patience = Patience(self._retries)
        while True:
            try:
                return self._manifest(which)
            except RegistryError as error:
                patience.failed(error)

    def _manifest(self, which: str) -> tuple[bytes, str | None, str]:
        shown = f"{self._shown}{'@' if DIGEST.fullmatch(which) else ':'}{which}"
        with self._get(f"/v2/{self._name}/manifests/{which}", {"Accept": ACCEPT}, shown) as response:
            if response.status_code != 200:
                raise RegistryRefused(f"answered {response.status_code}", field=shown)
            data = self._limited(response, MAX_DOCUMENT, shown)
            content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower() or None
            claimed = response.headers.get("Docker-Content-Digest")
        digest = digest_of(data)
        if DIGEST.fullmatch(which) and digest != which:
            raise InvalidImage(f"the registry sent other bytes ({digest})", field=shown)
        if claimed and DIGEST.fullmatch(claimed) and claimed != digest:
            raise InvalidImage(f"the registry calls it {claimed}, but it is {digest}", field=shown)
        return data, content_type, digest

    def blob(self, incoming: Incoming, progress: Callable[[], None]) -> None:
        """Fetch what is missing of a blob, and commit it. What an earlier try left is gone on with."""
        patience = Patience(self._retries)
        resumed, mark = incoming.length > 0, incoming.length
        while True:
            try:
                if not incoming.complete:
                    self._blob(incoming, progress)
                if incoming.right:
                    incoming.commit()
                    return
                incoming.restart()
                if not resumed:
                    raise InvalidImage("the registry sent other bytes than its digest says", field=incoming.blob.digest)
                resumed, mark = False, 0  # the old half was damaged: once more, from the start
            except RegistryError as error:
                if incoming.length - mark >= ENOUGH:
                    patience.forget()
                mark = incoming.length
                patience.failed(error)

    def _blob(self, incoming: Incoming, progress: Callable[[], None]) -> None:
        blob, start = incoming.blob, incoming.length
        shown = f"{self._shown}@{blob.digest}"
        asked = {"Range": f"bytes={start}-"} if start else {}
        with self._get(f"/v2/{self._name}/blobs/{blob.digest}", asked, shown) as response:
            if response.status_code == 416:
                incoming.restart()
                raise RegistryError("cannot go on where the last try ended", field=shown)
            if response.status_code == 206:
                match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
                if not match or int(match[1]) != start:
                    incoming.restart()
                    raise RegistryError("sent another part than was asked for", field=shown)
                if match[3] not in ("*", str(blob.size)):
                    raise InvalidImage(f"has {match[3]} bytes, the manifest says {blob.size}", field=shown)
            elif response.status_code == 200:
                if start:
                    incoming.restart()
                length = response.headers.get("Content-Length")
                if length is not None and length != str(blob.size):
                    raise InvalidImage(f"has {length[:20]} bytes, the manifest says {blob.size}", field=shown)
            else:
                raise RegistryRefused(f"answered {response.status_code}", field=shown)
            with _transport(shown):
                for chunk in response.iter_raw(CHUNK):
                    incoming.write(chunk)
                    progress()
        if not incoming.complete:
            raise RegistryError(f"ended after {incoming.length} of {blob.size} bytes", field=shown)

    # --- requests ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _get(self, path: str, headers: Mapping[str, str], shown: str) -> Iterator[httpx.Response]:
        """A response that is not an error (416 is let through). Its body has not been read."""
        url = self._url.copy_with(path=path)
        response = self._send(url, headers, shown)
        if response.status_code == 401 and _same_origin(response.url, self._url):
            challenge = response.headers.get_list("WWW-Authenticate")
            response.close()
            self._authorize(challenge, shown)
            response = self._send(url, headers, shown)
        try:
            if response.status_code >= 400 and response.status_code != 416:
                raise self._failure(response, shown)
            yield response
        finally:
            response.close()

    def _send(self, url: httpx.URL, headers: Mapping[str, str], shown: str) -> httpx.Response:
        """Follow redirects; our credentials go to the registry itself only."""
        for _ in range(MAX_REDIRECTS + 1):
            own = {"Authorization": self._authorization} if self._authorization else {}
            extra = own if _same_origin(url, self._url) else {}
            with _transport(shown):
                request = self._client.build_request("GET", url, headers={**headers, **extra})
                response = self._client.send(request, stream=True)
            if response.status_code not in _REDIRECTS:
                return response
            location = response.headers.get("Location", "")
            response.close()
            try:
                url = url.join(location)
            except httpx.InvalidURL:
                raise RegistryRefused("redirects to an invalid address", field=shown) from None
            if not self._may_be_asked(url):
                raise RegistryRefused(
                    f"redirects to {url.scheme}://{url.netloc.decode()}, which is not protected", field=shown
                )
        raise RegistryRefused(f"redirects more than {MAX_REDIRECTS} times", field=shown)

    def _may_be_asked(self, url: httpx.URL) -> bool:
        """Never from TLS to plain HTTP."""
        return url.scheme in ("https", self._url.scheme) and bool(url.host) and (url.port or 0) <= 65535

    def _failure(self, response: httpx.Response, shown: str) -> Exception:
        status, said = response.status_code, self._explanation(response)
        if status == 401 or status == 403:
            known = "the credentials were not accepted" if self._credentials else "it wants credentials"
            return RegistryDenied(f"{known} ({status}{said})", field=shown, hint="see images.credentials")
        if status == 404:
            return NotFound(f"is not in the registry{said}", field=shown, hint="check the name and the tag")
        if status in _PASSING:
            return RegistryError(f"answered {status}{said}", field=shown, retry_after=_retry_after(response))
        return RegistryRefused(f"answered {status}{said}", field=shown)

    def _explanation(self, response: httpx.Response) -> str:
        """What the registry says of it, made harmless."""
        try:
            said = json.loads(next(response.iter_raw(MAX_EXPLANATION), b""))["errors"][0]["message"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError, RecursionError):
            return ""  # it has not said anything that we understand; the status is enough
        return f": {self._clean(said)[:200]}" if isinstance(said, str) and said else ""

    def _clean(self, text: str) -> str:
        secrets = list(self._credentials.secrets) if self._credentials else []
        if self._authorization:
            secrets.append(self._authorization.partition(" ")[2])
        for secret in secrets:
            text = text.replace(secret, "***")
        return "".join(char for char in text if char.isprintable())

    def _limited(self, response: httpx.Response, limit: int, shown: str) -> bytes:
        data = b""
        with _transport(shown):
            for chunk in response.iter_raw(CHUNK):
                data += chunk
                if len(data) > limit:
                    raise InvalidImage(f"the answer is larger than {limit} bytes", field=shown)
        return data

    # --- who we are --------------------------------------------------------------------------------------------------

    def _authorize(self, challenges: list[str], shown: str) -> None:
        """Find out what the registry wants (it said 401) and get it. Raises RegistryDenied, RegistryError."""
        offers = {scheme: values for text in challenges for scheme, values in parse_challenges(text)}
        used, self._authorization = self._authorization, None
        if "bearer" in offers:
            self._authorization = f"Bearer {self._token(offers['bearer'], shown)}"
        elif "basic" in offers and self._credentials and self._credentials.basic and used is None:
            self._authorization = self._credentials.basic
        elif self._credentials:
            raise RegistryDenied("the credentials were not accepted", field=shown, hint="see images.credentials")
        else:
            raise RegistryDenied("it wants credentials", field=shown, hint="see images.credentials")

    def _token(self, offer: Mapping[str, str], shown: str) -> str:
        try:
            realm = httpx.URL(offer.get("realm", ""))
        except httpx.InvalidURL:
            realm = httpx.URL("")
        if not self._may_be_asked(realm):
            raise RegistryRefused("names a token server that is not protected or not valid", field=shown)
        wanted = {"service": offer.get("service", ""), "scope": offer.get("scope") or f"repository:{self._name}:pull"}
        wanted = {key: value for key, value in wanted.items() if value}
        known = self._credentials
        with _transport(shown):
            if known and known.identity:
                form = {**wanted, "grant_type": "refresh_token", "client_id": "slotd", "refresh_token": known.identity}
                request = self._client.build_request("POST", realm, data=form)
            else:
                headers = {"Authorization": known.basic} if known and known.basic else {}
                request = self._client.build_request("GET", realm.copy_merge_params(wanted), headers=headers)
            response = self._client.send(request, stream=True)
        try:
            if response.status_code != 200:
                failure = self._failure(response, f"{shown} (token server {realm.host})")
                raise failure if not isinstance(failure, NotFound) else RegistryRefused(failure.message, field=shown)
            data = self._limited(response, MAX_TOKEN, shown)
        finally:
            response.close()
        try:
            document = json.loads(data)
            token = document.get("token") or document.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
            raise RegistryRefused("its token server gave no token", field=shown)
        return token


class Patience:
    """A bounded number of tries, with back-off in between; the registry's own wish (Retry-After) goes first."""

    def __init__(self, retries: int) -> None:
        self._retries = retries
        self._tries = 0

    def forget(self) -> None:
        """There was progress: count from the start."""
        self._tries = 0

    def failed(self, error: RegistryError) -> None:
        """Wait before the next try. Raises `error` if it is permanent, or tries are used up."""
        if isinstance(error, (RegistryDenied, RegistryRefused)) or self._tries >= self._retries:
            raise error
        wished = error.retry_after
        if wished is not None and wished > RETRY_AFTER_MAX:
            raise error
        backoff = min(BACKOFF_FIRST * 2**self._tries, BACKOFF_MAX) * random.uniform(0.75, 1.25)  # noqa: S311  # jitter
        self._tries += 1
        time.sleep(backoff if wished is None else wished)


@contextmanager
def _transport(shown: str) -> Iterator[None]:
    """What httpx raises, in our words. Addresses are left out: they may carry a signature in their query."""
    try:
        yield
    except httpx.TimeoutException:
        raise RegistryError("did not answer in time", field=shown, hint="see images.timeout") from None
    except httpx.TransportError as error:
        cause = _root(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise RegistryRefused(
                f"its certificate is not trusted: {cause.verify_message}",
                field=shown,
                hint="install the registry's CA on this host, and check its clock",
            ) from None
        if isinstance(error, httpx.RemoteProtocolError) and isinstance(error.__context__, httpx.InvalidURL):
            raise RegistryRefused("redirects to an invalid address", field=shown) from None
        if isinstance(cause, ssl.SSLError) and cause.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            raise RegistryRefused(
                "does not speak TLS", field=shown, hint="add its host:port to images.insecure_registries"
            ) from None
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else type(error).__name__
        raise RegistryError(
            f"cannot be reached: {reason}", field=shown, hint="check the registry and the network, then deploy again"
        ) from None
    except httpx.InvalidURL:
        raise RegistryRefused("its address is not valid", field=shown) from None


def _root(error: BaseException) -> BaseException:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _same_origin(one: httpx.URL, other: httpx.URL) -> bool:
    ports = {"http": 80, "https": 443}
    return (one.scheme, one.host, one.port or ports.get(one.scheme)) == (
        other.scheme,
        other.host,
        other.port or ports.get(other.scheme),
    )


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds, from a number or a date; None if the registry has no wish."""
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        when = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(0.0, when - time.time())


_SCHEME = re.compile(r"\s*,?\s*([A-Za-z0-9_-]+)(?:\s+(?=[A-Za-z_-]+\s*=)|\s*(?=,|$))")
_PARAMETER = re.compile(r'\s*,?\s*([A-Za-z_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')


def parse_challenges(header: str) -> list[tuple[str, dict[str, str]]]:
    """The (scheme, parameters) of a WWW-Authenticate header, schemes and keys in lower case; stops at what is odd."""
    found: list[tuple[str, dict[str, str]]] = []
    position, header = 0, header[:4096]
    while position < len(header):
        if found and (parameter := _PARAMETER.match(header, position)):
            value = re.sub(r"\\(.)", r"\1", parameter[2]) if parameter[2] is not None else parameter[3]
            found[-1][1][parameter[1].lower()] = value
            position = parameter.end()
        elif scheme := _SCHEME.match(header, position):
            found.append((scheme[1].lower(), {}))
            position = scheme.end()
        else:
            break
    return found
