"""JSON Web Tokens of an identity provider: what one is, whether it holds, and whose it is. Pure; the time is an
argument. A message says which check failed and never what the token holds.

Only signatures with a public key count, so a shared secret or ``none`` cannot be put in the place of one. Names that
occur twice in the header or the claims are refused: two readers might understand them differently.
"""

import binascii
import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from agent.config_oidc import Oidc
from shared.errors import Refused
from shared.keys import is_name

MOST_TOKEN = 8 << 10
"""Characters of a token, as of all headers of a request."""
MOST_KEYS = 100
MOST_ID = 256
"""Characters of a key's id."""
LEAST_RSA_BITS = 2048
LEEWAY_S = 60
"""By how much clocks may differ."""
_TYPES = (None, "jwt", "at+jwt", "application/at+jwt")
"""Other types are not for showing who one is: a logout token, a security event."""
_FAMILY = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
_WORDS = {"exp": "has expired", "nbf": "is not valid yet", "iat": "was issued in the future"}


class BadToken(Exception):
    """A token that does not hold; the text says why, in the words of this program."""


class Header(NamedTuple):
    """What a token says about its signature; ``kid`` is "" where it names no key."""

    alg: str
    kid: str


Keys = Mapping[str, Sequence[Any]]
"""The provider's public keys by their id; a key without one is under ""."""


def looks_like_one(token: str) -> bool:
    """Whether a bearer token may be a signed JWT; API keys have no dots."""
    return token.count(".") == 2


def keys_of(body: bytes) -> Keys:
    """The keys of a JWKS that signatures can be checked with; the others are left out. Raises Refused where none is
    left."""
    import joserfc.jwt  # noqa: F401  (for the checks to come: here it is imported beside the event loop)
    from joserfc.jwk import import_key

    found: dict[str, list[Any]] = {}
    try:
        listed = json.loads(body)["keys"]
        for one in listed[:MOST_KEYS]:
            if _usable(one):
                found.setdefault(one.get("kid", ""), []).append(import_key(one))
    except Exception as error:  # noqa: BLE001  (the library raises what it likes for what it cannot read)
        raise Refused(f"the JWKS cannot be read ({type(error).__name__})") from None
    if not found:
        raise Refused("the JWKS has no public key for signatures (RSA of 2048 bits, EC or OKP)")
    return found


def _usable(one: Any) -> bool:
    kid = one.get("kid", "")
    if not isinstance(kid, str) or len(kid) > MOST_ID or one.get("use", "sig") != "sig" or "d" in one:
        return False
    bits = len(one.get("n", "")) * 6
    return one.get("kty") in ("EC", "OKP") or (one.get("kty") == "RSA" and bits >= LEAST_RSA_BITS)


def header_of(token: str, algorithms: Collection[str]) -> Header:
    """The algorithm and the key that a token names. Raises BadToken."""
    if len(token) > MOST_TOKEN:
        raise BadToken(f"is longer than {MOST_TOKEN} characters")
    header = _object(token.partition(".")[0])
    alg, kid, kind = header.get("alg"), header.get("kid", ""), header.get("typ")
    if not isinstance(alg, str) or alg not in algorithms:
        raise BadToken("is signed by an algorithm that is not in oidc.algorithms")
    if not isinstance(kid, str) or len(kid) > MOST_ID:
        raise BadToken("names a key by something else than a short text")
    if (kind.lower() if isinstance(kind, str) else kind) not in _TYPES:
        raise BadToken("is of a type for another purpose")
    if "crit" in header or "b64" in header:
        raise BadToken("has an extension that this server does not know")
    return Header(alg, kid)


def key_for(header: Header, keys: Keys) -> Any | None:
    """The key of a signature: by its id, or the only one that fits a token without one. None where there is none, or
    several."""
    there = keys.get(header.kid, ()) if header.kid else [key for each in keys.values() for key in each]
    fitting = [
        key for key in there if key.key_type == _FAMILY[header.alg[:2]] and key.get("alg", header.alg) == header.alg
    ]
    return fitting[0] if len(fitting) == 1 else None


def claims_of(token: str, header: Header, key: Any, oidc: Oidc, now_s: float) -> dict[str, Any]:
    """The claims of a token whose signature, issuer, audience and times hold. Raises BadToken."""
    from joserfc import errors, jws, jwt

    registry = jws.JWSRegistry(algorithms=[header.alg], strict_check_header=False)
    registry.max_header_length = MOST_TOKEN
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.SecurityWarning)  # the older name of Ed25519, which providers use
            jws.deserialize_compact(token, key, registry=registry)
    except Exception:  # noqa: BLE001  (whatever it is, the signature was not found to be right)
        raise BadToken("has no valid signature of oidc.issuer") from None
    claims = _object(token.split(".")[1])
    wanted = jwt.JWTClaimsRegistry(
        now=int(now_s),
        leeway=LEEWAY_S,
        iss={"essential": True, "value": oidc.issuer},
        aud={"essential": True, "values": list(oidc.audience)},
        exp={"essential": True},
    )
    try:
        wanted.validate(claims)
    except errors.ClaimError as error:
        raise BadToken(_words(error.claim)) from None
    except Exception:  # noqa: BLE001  (a claim of a kind that the library did not expect)
        raise BadToken("has a claim of a wrong type") from None
    return claims


def _words(claim: str) -> str:
    if "iss" in claim:
        return "is of another issuer than oidc.issuer"
    if "aud" in claim:
        return "is for another audience than oidc.audience"
    return _WORDS.get(claim, "lacks a claim or has one of a wrong type")


def id_of(claims: Mapping[str, Any], oidc: Oidc, of_keys: Collection[str]) -> str:
    """The key id of a client: by [[oidc.clients]], else the claim itself where oidc.ids matches it. An API key's own id
    (``of_keys``) is only given by [[oidc.clients]]: nobody gets it by being called the same. Raises BadToken."""
    value = claims.get(oidc.claim)
    if not isinstance(value, str) or not value:
        raise BadToken("does not say in oidc.claim whose it is")
    for client in oidc.clients:
        if client.value == value:
            return client.id
    if oidc.ids and is_name(value) and value not in of_keys and re.fullmatch(oidc.ids, value):
        return value
    raise BadToken("is of a client that neither [[oidc.clients]] nor oidc.ids knows")


def _object(part: str) -> dict[str, Any]:
    """A part of a token as a JSON object without repeated names. Raises BadToken."""
    try:
        raw = binascii.a2b_base64(part.translate(_URL_SAFE) + "=" * (-len(part) % 4), strict_mode=True)
        found = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise BadToken("is not a JSON Web Token") from None
    if not isinstance(found, dict):
        raise BadToken("is not a JSON Web Token")
    return found


_URL_SAFE = str.maketrans({"-": "+", "_": "/", "+": "!", "/": "!"})


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadToken("says something twice")
    return found
