"""Models from the Hugging Face hub, by its own client over plain HTTP. Blocking; use a thread.

Nothing is asked of the hub unless somebody names one of its models. The client's module is imported then, because it
takes a third of a second.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec

from agent.files.hub_listing import (
    ORIGIN_NAME,
    Asked,
    HubFile,
    Listing,
    Origin,
    is_blob,
    licence_of,
    offline_because,
    taken,
)
from agent.files.model_folder import ModelFolder
from shared import catalog, connection_errors
from shared.catalog import Manifest, ModelFile
from shared.errors import RackError, Refused, Retryable

ASK_TIMEOUT_S = 30.0
PIECE_BYTES = 256 << 10
"""The client hands over what it has received in pieces of this size; a kill loses one of them."""
TOKEN_HINT = (
    "set HF_TOKEN, or pass a reference to the token: --token env:NAME, file:/path, keychain:service or op://..."
)


class Hub:
    """The hub at HF_ENDPOINT. ``token`` is sent to it and to nobody else; without one the client looks for HF_TOKEN and
    for its own login. Raises Refused when this process has to stay offline."""

    def __init__(self, environ: Mapping[str, str], *, token: str = "", offline: bool = False) -> None:
        if why := offline_because(environ, asked=offline):
            remedy = "unset it, or pull from a folder or the bucket"
            raise Refused(f"the hub is not asked, because {why}; {remedy}", code="offline")
        for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ[name] = "1"  # read when the client is imported
        from huggingface_hub import constants, set_client_factory
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars, logging

        from agent.files import hub_transport

        constants.DOWNLOAD_CHUNK_SIZE = PIECE_BYTES
        set_client_factory(hub_transport.client)
        disable_progress_bars()
        logging.set_verbosity_error()  # its warnings quote signed addresses
        self._token, self.address = token or None, environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        # a compressed answer cannot be resumed
        self._headers = {**build_hf_headers(token=self._token), "Accept-Encoding": hub_transport.AS_FILE}

    def listing(self, asked: Asked) -> Listing:
        """The files and the commit of a model. Raises Refused when there is none or it cannot be served here, Retryable
        when the hub does not answer."""
        from huggingface_hub import HfApi

        with self._as_ours(asked):
            info = HfApi(self.address, token=self._token).model_info(
                asked.repo, revision=asked.revision or None, files_metadata=True, timeout=ASK_TIMEOUT_S
            )
        card = info.card_data.to_dict() if info.card_data else {}
        origin = Origin(repo=info.id, revision=str(info.sha), licence=licence_of(card))
        return Listing(origin=origin, files=taken(info.id, [_listed(file) for file in info.siblings or ()]))

    def source(self, listing: Listing, known: Sequence[Path] = ()) -> "HubSource":
        """A source for ``pull``. Files that the hub lists without a SHA-256 are fetched now, except those in one of the
        ``known`` folders."""
        small = {file.name: self._small(listing, file, known) for file in listing.files if not file.sha256}
        return HubSource(self, listing, small)

    def fetch(self, origin: Origin, name: str, size: int, start: int, write: Callable[[bytes], object]) -> None:
        """One file's bytes from ``start`` to its end; a lost connection is resumed a few times."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get

        url = hf_hub_url(origin.repo, name, revision=origin.revision, endpoint=self.address)
        target = cast(BinaryIO, _Target(write, start))
        with self._as_ours(Asked(origin.repo, origin.revision)):
            http_get(url, target, resume_size=start, headers=self._headers, expected_size=size)

    def _small(self, listing: Listing, file: HubFile, known: Sequence[Path]) -> bytes:
        for folder in known:
            with contextlib.suppress(Refused):
                content = ModelFolder(folder, listing.origin.repo).find(file.name, file.size)
                if content is not None and is_blob(content, file.blob):
                    return content
        for _ in range(2):
            buffer = io.BytesIO()
            self.fetch(listing.origin, file.name, file.size, 0, buffer.write)
            if is_blob(content := buffer.getvalue(), file.blob):
                return content
        why = f"{file.name} is not what the hub lists (git blob {file.blob[:12]}..), twice; nothing was installed"
        raise Refused(f"pull {listing.origin.repo}: {why}; pull again later", code="bad_hash")

    @contextlib.contextmanager
    def _as_ours(self, asked: Asked) -> Iterator[None]:
        import httpx2

        try:
            yield
        except RackError:
            raise
        except httpx2.HTTPError as error:
            raise self._refusal(error, asked) from None
        except OSError as error:
            if error.errno is not None:
                raise  # of the disk
            raise Retryable(f"pull {asked.repo}: {self.address} sent less than it lists; pull again") from None
        except ValueError as error:
            # the client's checks of names, and its limit of 50 GB for one file over plain HTTP
            raise Refused(f"pull {asked.repo}: {str(error).splitlines()[0].strip()}", code="bad_model") from None

    def _refusal(self, error: Exception, asked: Asked) -> RackError:
        from huggingface_hub import errors

        what, page = f"pull {asked.repo}", f"{self.address}/{asked.repo}"
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
        if isinstance(error, errors.GatedRepoError):
            account = "of that account" if status == 401 else "of an account that was granted access"
            remedy = f"accept its licence at {page}, then use a token {account}: {TOKEN_HINT}"
            return Refused(f"{what}: the model is gated ({status}); {remedy}", code="gated")
        if isinstance(error, errors.RevisionNotFoundError):
            return Refused(f"{what}: the hub has no revision {asked.revision!r} of it; see {page}", code="not_found")
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return Refused(f"{what}: a file that the hub lists is not there; pull again", code="not_found")
        if isinstance(error, errors.RepositoryNotFoundError):
            remedy = f"check its name at {page}; for a private model {TOKEN_HINT}"
            return Refused(f"{what}: the hub has no such model ({status}); {remedy}", code="not_found")
        if status in (401, 403):
            return Refused(f"{what}: the hub rejected the token ({status}); {TOKEN_HINT}", code="gated")
        if 400 <= status < 500 and status not in (408, 429):
            return Refused(f"{what}: {self.address} answered {status}", code="bad_model")
        silence = connection_errors.why(error, self.address, "HF_ENDPOINT")
        seen = f"answered {status}" if status else f"cannot be reached: {silence}"
        return Retryable(f"{what}: {self.address} {seen}; what was fetched is kept, pull again")


class HubSource:
    """A model at one commit, for ``pull``. ``small`` holds its files that are in memory already."""

    def __init__(self, hub: Hub, listing: Listing, small: Mapping[str, bytes]) -> None:
        self._hub, self._origin, self._small = hub, listing.origin, small
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in small.items()}
        files = [ModelFile(name=f.name, size=f.size, sha256=f.sha256 or hashes[f.name]) for f in listing.files]
        self.manifest = Manifest(files=tuple(files))
        index = small.get(catalog.INDEX_NAME)
        if index and (missing := catalog.missing_shards(index, {file.name for file in files})):
            raise Refused(f"pull {self._origin.repo}: the hub lacks its weights file {missing[0]}", code="bad_model")

    @property
    def config(self) -> bytes:
        """config.json; b"" if it has none."""
        return self._small.get("config.json", b"")

    def copy(self, file: ModelFile, start: int, write: Callable[[bytes], object]) -> None:
        if (content := self._small.get(file.name)) is not None:
            write(content[start:])
        else:
            self._hub.fetch(self._origin, file.name, file.size, start, write)

    def companion(self, name: str) -> bytes | None:
        return msgspec.json.encode(self._origin) if name == ORIGIN_NAME else None


class _Target:
    """The client's view of a file whose bytes go to ``write``, each once. A server that ignores a range sends the file
    from its beginning, and the client rewinds; what was written before is then skipped."""

    def __init__(self, write: Callable[[bytes], object], start: int) -> None:
        self._write, self._at, self._skip = write, start, 0

    def tell(self) -> int:
        return self._at - self._skip

    def seek(self, offset: int) -> None:
        self._skip = self._at - offset

    def truncate(self) -> None:
        """Nothing to cut: what was written is good."""

    def write(self, piece: bytes) -> None:
        fresh = piece[self._skip :]
        self._skip = max(0, self._skip - len(piece))
        self._at += len(fresh)
        if fresh:
            self._write(fresh)


def _listed(file: Any) -> HubFile:
    return HubFile(
        name=file.rfilename,
        size=-1 if file.size is None else file.size,
        blob=file.blob_id or "",
        sha256=file.lfs.sha256 if file.lfs else "",
    )
