"""An object store over S3: Cloudflare R2, SeaweedFS or any other with conditional writes.

Each client setting fixes an observed problem: no aws-chunked trailers (R2 rejects them), no ``Expect: 100-continue``
(a second per PUT on servers that never send the 100), path-style addressing and region ``auto``.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from itertools import pairwise
from typing import Any, BinaryIO

import boto3
import boto3.exceptions
import botocore.exceptions
import botocore.handlers
import botocore.parsers
import botocore.session
import urllib3.exceptions
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from shared import connection_errors
from shared.botocore_data import SmallLoader
from shared.errors import AccessDenied, Halt, NotFound, PreconditionFailed, Refused, Retryable
from shared.store import Listed, Stored, too_large
from shared.store_pace import CALL_S, NOT_A_STORE, answer_of, pool_classes

_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Unauthorized", "ExpiredToken", "Forbidden"}
NO_BUCKET = "no_bucket"
"""Code of the AccessDenied for a bucket that does not exist, where the store says so."""
_DENIALS = {
    "InvalidAccessKeyId": "it does not know this key; check store.access_key",
    "SignatureDoesNotMatch": "the secret does not belong to the key; check store.access_key and store.secret_key",
    "ExpiredToken": "they have expired; check store.access_key and store.secret_key",
}
_DENIAL = (
    "they may not do this, or there is no such bucket, which this store does not tell apart; check store.access_key, "
    "what that key may do, and store.bucket"
)
_HOPELESS = {"EntityTooLarge", "KeyTooLongError", "MetadataTooLarge"}
_LOST = {"PreconditionFailed", "ConditionalRequestConflict"}
_CONFIG = Config(
    region_name="auto",
    signature_version="s3v4",
    s3={"addressing_style": "path"},
    max_pool_connections=16,
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)
_SAID_BY_A_STORE = (*range(300, 412), *range(413, 429), *range(430, 501), 511)
"""Statuses that a store explains by a code; a bare one comes from something between, or is botocore's 500 for a 200
that is not XML. 412 and 429 speak for themselves."""
_PARTS = TransferConfig(max_concurrency=4)
"""Parts of a file that travel at once: each keeps the pace that store_pace asks for on a slow line."""
PIECE_BYTES = 256 << 10
MOST_EMPTY_PAGES = 100
"""Pages of a listing that hold nothing but empty objects, before it is given up."""
_CODE = re.compile(r"[A-Za-z0-9.]{1,64}")
"""An error code that may be printed."""
_S3_ETAG = re.compile(r"[0-9a-f]{32}(-\d+)?")
_TYPE = "application/octet-stream"
"""Of everything that we write; without one some stores guess from the content."""
_ODD = (LookupError, TypeError, ValueError, AttributeError, botocore.parsers.ResponseParserError)
"""What boto3 raises over an answer that has not the form of S3's."""
_ORDERS: tuple[Callable[[bytes], bytes], ...] = (lambda key: key, lambda key: key.replace(b"/", b"\0"))
"""Orders in which stores list: by bytes, or folder by folder as SeaweedFS does, where a/x comes before a-b/x."""
EMPTY_ETAG = "d41d8cd98f00b204e9800998ecf8427e"
"""ETag of an empty object on every store: the MD5 of no bytes."""


class _Counted:
    """A file that is read once from its beginning, and how many bytes of it were."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.bytes = file, 0

    def read(self, count: int = -1) -> bytes:
        """At most ``count`` bytes."""
        piece = self._file.read(count)
        self.bytes += len(piece)
        return piece


class S3Store:
    """ObjectStore over one bucket, below an optional key prefix.

    A conditional write on a missing key raises PreconditionFailed, whether the server answers 404 or 412.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        bucket: str,
        access_key: str,
        secret_key: str,
        prefix: str = "",
        session_token: str | None = None,
        connect_timeout_s: float = 5,
        read_timeout_s: float = 20,
        call_s: float = CALL_S,
        attempts: int = 3,
        verify: str | bool | None = None,
    ) -> None:
        """``verify`` is a file of CAs in PEM that the endpoint's certificate must be signed by (None: public ones);
        False checks nothing, and is for a server that this process has started."""
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._client: Any = _client(
            endpoint,
            Config(
                retries={"mode": "standard", "total_max_attempts": attempts},
                connect_timeout=connect_timeout_s,
                read_timeout=read_timeout_s,
            ),
            call_s,
            verify,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            aws_session_token=session_token,
        )
        self._client.meta.events.unregister("before-call.s3", botocore.handlers.add_expect_header)
        self._client.meta.events.register("after-call.s3", self._note_date)
        self._skew_ms: int | None = None

    @property
    def clock_skew_ms(self) -> int | None:
        return self._skew_ms

    def forget_clock(self) -> None:
        self._skew_ms = None

    def _note_date(self, http_response: Any = None, **_: object) -> None:
        """Measure the clock skew from the Date header of a response."""
        with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError, OverflowError):
            theirs = parsedate_to_datetime(http_response.headers["date"])
            skew_ms = round((time.time() - theirs.timestamp()) * 1000)
            # the header has whole seconds, so less than one is no skew
            self._skew_ms = 0 if 0 <= skew_ms < 1000 else skew_ms - 500

    def put(self, key: str, body: bytes) -> str:
        return self._put(key, body, {})

    def put_if_absent(self, key: str, body: bytes) -> str:
        try:
            return self._put(key, body, {"IfNoneMatch": "*"})
        except PreconditionFailed:
            # of several writers that find the same empty object, one wins
            return self.put_if_match(key, body, EMPTY_ETAG)

    def put_if_match(self, key: str, body: bytes, etag: str) -> str:
        with _as_ours("put", key):
            try:
                return self._put(key, body, {"IfMatch": f'"{etag}"'})
            except NotFound:
                raise PreconditionFailed(f"put {key}: the object no longer exists") from None

    def get(self, key: str, most_bytes: int) -> Stored:
        with _as_ours("get", key), answer_of(most_bytes):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)
            # one that is not believed would leave its connection open
            with contextlib.closing(answer["Body"]):
                etag = _etag(answer, f"get {key}")
                body = _body(answer, f"get {key}", most_bytes)
        if not body:
            raise NotFound(f"get {key}: empty object, left by an interrupted write")
        return Stored(body, etag)

    def get_part(self, key: str, start: int, length: int) -> bytes:
        if length <= 0:
            return b""
        wanted = f"bytes={start}-{start + length - 1}"
        with _as_ours("get", key), answer_of(length):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, Range=wanted)
            except botocore.exceptions.ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:
                    return b""
                raise
            with contextlib.closing(answer["Body"]):
                _etag(answer, f"get {key}")
                range_is_right = str(answer.get("ContentRange", "")).startswith(f"bytes {start}-")
                if not range_is_right or answer["ContentLength"] > length:
                    raise Retryable(f"get {key}: it answered another part than {wanted}: {NOT_A_STORE}")
                return _body(answer, f"get {key}", length)

    def put_file(self, key: str, file: BinaryIO) -> None:
        counted = _Counted(file)
        # multipart for large files: one PUT takes 5 GB at most
        with _as_ours("put", key):
            try:
                more = {"ContentType": _TYPE}
                self._client.upload_fileobj(counted, self._bucket, self._prefix + key, more, Config=_PARTS)
            except boto3.exceptions.S3UploadFailedError as error:
                if isinstance(error.__context__, botocore.exceptions.ClientError):
                    raise error.__context__ from None
                raise Retryable(f"put {key}: upload of the file failed") from None
            except OSError as error:
                if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
                    raise Retryable(f"put {key}: the store does not respond: {_silence(error)}") from None
                raise Refused(f"put {key}: the file cannot be read ({error.strerror})", code="bad_file") from None
        # the upload's own answers are not shown to us
        if counted.bytes and len(self.get_part(key, counted.bytes - 1, 2)) != 1:
            raise Retryable(f"put {key}: it does not hold the {counted.bytes} bytes that it accepted: {NOT_A_STORE}")

    def list_after(self, prefix: str, after: str = "", limit: int = 1000) -> list[Listed]:
        arguments = {"Bucket": self._bucket, "Prefix": self._prefix + prefix, "MaxKeys": limit}
        for _ in range(MOST_EMPTY_PAGES):
            if after:
                arguments["StartAfter"] = self._prefix + after
            with _as_ours("list", prefix):
                page = self._page(self._client.list_objects_v2(**arguments), prefix, after, limit)
            if (found := [one for one in page if one.size]) or not page:
                return found
            after = page[-1].key  # a page that has only empty objects is not the end
        raise Retryable(f"list {prefix}: {MOST_EMPTY_PAGES} pages of nothing but empty objects: {NOT_A_STORE}")

    def _page(self, answer: Any, prefix: str, after: str, limit: int) -> list[Listed]:
        """A page of a listing, if it is what was asked for: callers go on from its last key. Raises Retryable."""
        cut = len(self._prefix)
        page = [
            Listed(o["Key"][cut:], int(o["Size"]), o["ETag"].strip('"'), _written_ms(o))
            for o in answer.get("Contents", ())
        ]
        keys = [after.encode(), *(one.key.encode() for one in page)]
        ordered = any(all(place(a) < place(b) for a, b in pairwise(keys)) for place in _ORDERS)
        theirs = all(o["Key"].startswith(self._prefix + prefix) for o in answer.get("Contents", ()))
        if "IsTruncated" not in answer or not (theirs and ordered) or len(page) > limit:
            raise Retryable(f"list {prefix}: the listing is not of these keys in order: {NOT_A_STORE}")
        return page

    def delete(self, key: str) -> None:
        with _as_ours("delete", key):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def create_bucket(self) -> None:
        """Create the bucket if it is missing; for tests, the demo and racks that run their own store."""
        there = (self._client.exceptions.BucketAlreadyOwnedByYou, self._client.exceptions.BucketAlreadyExists)
        with _as_ours("create bucket", self._bucket), contextlib.suppress(*there):
            self._client.create_bucket(Bucket=self._bucket)

    def _put(self, key: str, body: bytes, condition: dict[str, str]) -> str:
        if not key or len((self._prefix + key).encode()) > 1024 or "\0" in key:
            raise Refused(f"key {key!r}: invalid object key", code="bad_key")
        with _as_ours("put", key):
            answer = self._client.put_object(
                Bucket=self._bucket, Key=self._prefix + key, Body=body, ContentType=_TYPE, **condition
            )
            return _etag(answer, f"put {key}")


def _written_ms(listed: Any) -> int:
    """When the store wrote an object of a listing; 0 if it does not say so in a way that is a time."""
    try:
        return int(listed["LastModified"].timestamp() * 1000)
    except (KeyError, AttributeError, ValueError, OverflowError, OSError):
        return 0


def _etag(answer: Any, what: str) -> str:
    """The ETag of an answer. Raises Retryable for one that cannot be a store's: it has none, or is a page with the ETag
    of a web server. An object may be a page, and a store guess so from its first bytes."""
    etag, headers = answer.get("ETag"), answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if not isinstance(etag, str) or not etag.strip('"'):
        raise Retryable(f"{what}: the answer has no ETag: {NOT_A_STORE}")
    is_page = str(headers.get("content-type", "")).lower().startswith(("text/html", "application/xhtml"))
    if is_page and not _S3_ETAG.fullmatch(etag.strip('"')):
        raise Retryable(f"{what}: the answer is an HTML page: {NOT_A_STORE}")
    return etag.strip('"')


def _body(answer: Any, what: str, most_bytes: int) -> bytes:
    """The body of an answer, of which no more than ``most_bytes`` are ever held. Raises Refused for a larger one."""
    body, pieces, size = answer["Body"], list[bytes](), 0
    while size <= most_bytes and (piece := body.read(min(PIECE_BYTES, most_bytes + 1 - size))):
        pieces.append(piece)
        size += len(piece)
    if size > most_bytes:
        raise too_large(what, most_bytes)
    return b"".join(pieces)


def _client(
    endpoint: str, patience: Config, call_s: float, verify: str | bool | None, **credentials: str | None
) -> Any:
    core = botocore.session.Session()
    core.register_component("data_loader", SmallLoader())
    session = boto3.session.Session(botocore_session=core, **credentials)
    try:
        client = session.client("s3", endpoint_url=endpoint, config=_CONFIG.merge(patience), verify=verify)
    except ValueError:
        why = f"store.endpoint: invalid value {endpoint!r}: expected an http(s) URL"
        raise Halt(why, code="bad_endpoint") from None
    # botocore has no setting for its connections' class
    http = client._endpoint.http_session
    http._pool_classes_by_scheme = http._manager.pool_classes_by_scheme = pool_classes(call_s)
    return client


@contextlib.contextmanager
def _as_ours(verb: str, key: str) -> Iterator[None]:
    """Translate boto3's errors into the store's; no message quotes a credential."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        raise _translated(verb, key, error) from None
    except (botocore.exceptions.BotoCoreError, urllib3.exceptions.HTTPError) as error:
        inner = getattr(error, "kwargs", {}).get("error")
        if isinstance(inner, Retryable):
            raise Retryable(f"{verb} {key}: {inner.message}") from None
        if isinstance(inner, _ODD):
            raise Retryable(f"{verb} {key}: unreadable answer ({type(inner).__name__}): {NOT_A_STORE}") from None
        raise Retryable(f"{verb} {key}: the store does not respond: {_silence(error)}") from None
    except _ODD as error:
        raise Retryable(f"{verb} {key}: unreadable answer ({type(error).__name__}): {NOT_A_STORE}") from None


def _silence(error: Exception) -> str:
    url = str(getattr(error, "kwargs", {}).get("endpoint_url") or "")
    return connection_errors.why(error, url, "store.endpoint", ca="store.ca")


def _translated(verb: str, key: str, error: botocore.exceptions.ClientError) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    seen = f"{status} {code if _CODE.fullmatch(code) else ''}".strip()
    wait_s = _retry_after_s(error)
    if status in _SAID_BY_A_STORE and not (code and not code.isdigit()):
        return Retryable(f"{verb} {key}: {status} without an error code of S3: {NOT_A_STORE}", retry_after_s=wait_s)
    if status == 412 or code in _LOST:
        return PreconditionFailed(f"{verb} {key}: another writer was first")
    if code == "NoSuchBucket":
        return AccessDenied(f"{verb} {key}: no such bucket; create it or correct store.bucket", code=NO_BUCKET)
    if status == 404 or code == "NoSuchKey":
        return NotFound(f"{verb} {key}: no such object")
    if status in (401, 403) or code in _DENIED:
        if code == "RequestTimeTooSkewed":
            return Halt(f"{verb} {key}: clock skew too large; set this machine's clock", code="clock_skew")
        return AccessDenied(f"{verb} {key}: the store rejected the credentials ({seen}): {_DENIALS.get(code, _DENIAL)}")
    if status == 429 or status >= 500 or status == 0:
        return Retryable(f"{verb} {key}: store busy or unavailable ({seen})", retry_after_s=wait_s)
    if status == 413 or code in _HOPELESS:
        return Refused(f"{verb} {key}: the store rejected the object permanently ({seen})", code="store_refused")
    if code == "RequestTimeout":
        return Retryable(f"{verb} {key}: request timed out at the store ({seen})")
    return Halt(f"{verb} {key}: unexpected response ({seen}); check store.endpoint", code="store_refused")


def _retry_after_s(error: botocore.exceptions.ClientError) -> float | None:
    """Seconds from the Retry-After header; None if it is absent or a date."""
    given = str(error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", ""))
    return float(given) if given.isascii() and given.isdigit() and len(given) < 7 else None
