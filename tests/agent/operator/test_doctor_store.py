"""doctor asks the store for real: a missing bucket, a wrong key, a key that may not do it, and one that may."""

from pathlib import Path

import pytest

from agent.config import AgentConfig, Node
from agent.operator import checks, doctor
from agent.operator.checks import Finding
from agent.operator.resolved import Resolver
from scripts.seaweed import SeaweedFS
from shared.bucket import Store
from shared.errors import AccessDenied, PreconditionFailed
from shared.keys import claim_key
from shared.store import Listed, Stored
from shared.store_dir import DirectoryStore
from shared.store_s3 import NO_BUCKET

ENVIRON = {
    "ADMIN": SeaweedFS.ADMIN[0],
    "ADMIN_SECRET": SeaweedFS.ADMIN[1],
    "N1": "n1",
    "N1_SECRET": "n1secretn1secret",
    "NOBODY": "nobody",
}


def asked(seaweed: SeaweedFS, bucket: str, key: str, secret: str) -> list[Finding]:
    return asked_at(seaweed.endpoint, bucket, key, secret)


def asked_at(endpoint: str, bucket: str, key: str, secret: str) -> list[Finding]:
    store = Store(kind="s3", endpoint=endpoint, bucket=bucket, access_key=f"env:{key}", secret_key=f"env:{secret}")
    config = AgentConfig(node=Node(id="n1", rack="r"), store=store)
    return [one for one in doctor._store(config, Resolver(ENVIRON, "this shell")) if one.what == "store"]


def test_a_bucket_that_can_be_used(seaweed: SeaweedFS) -> None:
    store = seaweed.store("doctor-good")
    store.create_bucket()
    (found,) = asked(seaweed, "doctor-good", "ADMIN", "ADMIN_SECRET")
    assert (found.verdict, "shows at the first upload" in found.seen) == ("ok", True)
    etag = store.put(claim_key("n1", 1), b"a claim")
    (found,) = asked(seaweed, "doctor-good", "ADMIN", "ADMIN_SECRET")
    assert (found.verdict, found.seen.endswith("accepts the credentials")) == ("ok", True)
    there = store.get(claim_key("n1", 1), 100)
    assert (there.body, there.etag) == (b"a claim", etag), "looking changes nothing"


@pytest.mark.parametrize(
    ("bucket", "key", "secret", "words"),
    [
        ("doctor-good", "NOBODY", "NOBODY", "it does not know this key"),
        ("doctor-good", "ADMIN", "NOBODY", "the secret does not belong to the key"),
        ("doctor-none", "ADMIN", "ADMIN_SECRET", "no such bucket; create it or correct store.bucket"),
        ("doctor-good", "N1", "N1_SECRET", "there is no such bucket, which this store does not tell apart"),
        ("doctor-none", "N1", "N1_SECRET", "no such bucket"),
        ("doctor-good", "UNSET", "NOBODY", "cannot be asked without its secrets"),
    ],
)
def test_what_a_store_refuses_is_told_apart(seaweed: SeaweedFS, bucket: str, key: str, secret: str, words: str) -> None:
    seaweed.store("doctor-good").create_bucket()
    (found,) = asked(seaweed, bucket, key, secret)
    assert (found.verdict, words in found.seen) == ("problem", True), found
    assert not found.seen.startswith("get raw/"), "the key that was tried says nothing"
    assert all(value not in found.seen for value in ENVIRON.values() if len(value) > 6)


def test_a_node_s_own_key_may_do_what_a_node_does_and_what_it_may_not_is_said(seaweed: SeaweedFS) -> None:
    seaweed.store("scoped").create_bucket()
    findings = asked(seaweed, "scoped", "N1", "N1_SECRET")
    assert [one.verdict for one in findings] == ["warning"]
    assert "the desired state cannot be followed" in findings[0].seen


class Reticent(DirectoryStore):
    """Denies to read in a bucket that does not exist, and says so only to who lists it."""

    def get(self, key: str, most_bytes: int) -> Stored:
        raise AccessDenied(f"get {key}: the store rejected the credentials (403 AccessDenied): or no such bucket")

    def list_after(self, prefix: str, after: str = "", limit: int = 1000) -> list[Listed]:
        raise AccessDenied(f"list {prefix}: no such bucket; create it or correct store.bucket", code=NO_BUCKET)


def test_a_store_that_tells_of_a_missing_bucket_only_to_who_lists_is_asked_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "open_store", lambda *_, **__: Reticent(tmp_path))
    (found,) = asked_at("http://127.0.0.1:1", "bucket", "ADMIN", "ADMIN_SECRET")
    assert found.seen == "no such bucket; create it or correct store.bucket"


class Careless(DirectoryStore):
    """Ignores conditions, as some stores do."""

    def put_if_absent(self, key: str, body: bytes) -> str:
        return self.put(key, body)


def test_a_store_that_ignores_conditions_is_found_out(tmp_path: Path) -> None:
    careless = Careless(tmp_path / "careless")
    careless.put(claim_key("n1", 1), b"a claim")
    assert doctor._claim(careless, "n1") == "overwritten"
    assert careless.get(claim_key("n1", 1), 100).body == b"a claim"
    (found,) = checks.store("s3", checks.StoreFact(claim="overwritten"))
    assert found.verdict == "problem"
    careful = DirectoryStore(tmp_path / "careful")
    assert doctor._claim(careful, "n1") == "none"
    careful.put(claim_key("n1", 1), b"a claim")
    assert doctor._claim(careful, "n1") == "kept"
    with pytest.raises(PreconditionFailed):
        careful.put_if_absent(claim_key("n1", 1), b"another")


def test_a_folder_is_not_made_by_looking(tmp_path: Path) -> None:
    config = AgentConfig(node=Node(id="n1", rack="r"), store=Store(path=str(tmp_path / "bucket")))
    (found,) = doctor._store(config, Resolver({}, "this shell"))
    assert (found.verdict, "does not exist yet" in found.seen) == ("ok", True)
    assert not (tmp_path / "bucket").exists()
