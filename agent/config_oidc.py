"""Tokens of an identity provider, as agent.toml describes them: part of the configuration's schema."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

TokenAlgorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"
]
"""Signatures with a public key; those with a shared secret, and none, are no choice."""


class OidcClient(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A client of the identity provider: tokens whose ``oidc.claim`` is ``value`` count as the key ``id``."""

    value: str
    id: str


class Oidc(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens of an identity provider, as a client may send them instead of an API key (docs/oidc.md). ``issuer`` and
    one of ``audience`` must be those of the token; "" as issuer accepts none. Its public keys are those at
    ``jwks_url``, else where the issuer's OpenID document says; ``ca`` is a file of certificates that its https is
    checked with, instead of the system's.

    A client's key id is that of the ``clients`` table with the value of its ``claim``; where there is none, the value
    itself, if it matches all of the regular expression ``ids`` and is the id of none of [[keys]]."""

    issuer: str = ""
    audience: Annotated[tuple[str, ...], Meta(description="required with `oidc.issuer`")] = ()
    jwks_url: str = ""
    ca: str = ""
    claim: str = "sub"
    clients: tuple[OidcClient, ...] = ()
    ids: str = ""
    algorithms: Annotated[tuple[TokenAlgorithm, ...], Meta(min_length=1)] = ("RS256", "ES256")
