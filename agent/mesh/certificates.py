"""Make and read X.509 certificates: the rack's own certificate authority (CA) and its nodes' certificates.

Keys are on the curve P-256. A node's certificate serves both directions, and names it by its URI; names of DNS and
addresses are for clients that verify it.
"""

import datetime as dt
import ipaddress
from collections.abc import Sequence
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.mesh.node_names import uri_of
from shared.errors import Refused

CA_DAYS = 3650
NODE_DAYS = 398
"""The longest time that all clients accept; Apple's refuse longer ones."""
_EARLIER = dt.timedelta(minutes=10)
"""Validity begins before now, because another machine's clock may be behind."""


class Pair(NamedTuple):
    """A certificate and its private key, as PEM."""

    certificate: bytes
    key: bytes


class Described(NamedTuple):
    """What a certificate says. ``names`` are its URIs, DNS names and addresses."""

    subject: str
    issuer: str
    names: tuple[str, ...]
    is_ca: bool
    not_after_ms: int


def make_authority(rack: str, *, now: dt.datetime, days: int = CA_DAYS) -> Pair:
    """A CA for one rack, which signs nodes' certificates and no other CA's."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _named(f"mlxrack CA of {rack}"[:64])
    usage = _usage(signs=True)
    builder = _builder(name, name, key.public_key(), now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    return _pair(builder.sign(key, hashes.SHA256()), key)


def issue(
    authority: Pair,
    *,
    rack: str,
    node: str,
    names: Sequence[str],
    addresses: Sequence[str],
    now: dt.datetime,
    days: int,
) -> Pair:
    """A certificate of a node for both directions. Raises Refused for an authority or a name that cannot be used."""
    ca, ca_key = _authority(authority)
    if ca.not_valid_after_utc < now + dt.timedelta(days=days):
        until = f"{ca.not_valid_after_utc:%Y-%m-%d}"
        raise Refused(f"tls issue: the CA's own certificate ends on {until}; choose fewer --days, or a new CA")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_named(node), ca.subject, key.public_key(), now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = builder.add_extension(both, critical=False)
    own = [x509.UniformResourceIdentifier(uri_of(rack, node))]
    others = [*map(_dns, names), *map(_address, addresses)]
    builder = builder.add_extension(x509.SubjectAlternativeName([*own, *others]), critical=False)
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return _pair(builder.add_extension(above, critical=False).sign(ca_key, hashes.SHA256()), key)


def describe(pem: bytes) -> Described:
    """The first certificate of a file. Raises Refused."""
    try:
        one = x509.load_pem_x509_certificate(pem)
        subject, issuer = one.subject.rfc4514_string(), one.issuer.rfc4514_string()
    except ValueError:
        raise Refused("not a certificate in PEM", code="bad_certificate") from None
    try:
        names = [str(name.value) for name in one.extensions.get_extension_for_class(x509.SubjectAlternativeName).value]
    except (x509.ExtensionNotFound, ValueError):
        names = []
    try:
        is_ca = bool(one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
    except (x509.ExtensionNotFound, ValueError):
        is_ca = False
    ends_ms = int(one.not_valid_after_utc.timestamp() * 1000)
    return Described(subject=subject, issuer=issuer, names=tuple(names), is_ca=is_ca, not_after_ms=ends_ms)


def end_of(pem: bytes) -> int:
    """When the first of a file's certificates ends that ends at all, in ms. Raises Refused."""
    try:
        every = x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise Refused("not a certificate in PEM", code="bad_certificate") from None
    return int(min(one.not_valid_after_utc for one in every).timestamp() * 1000)


def first_of(pem: bytes) -> bytes:
    """The first certificate of a chain, alone. Raises Refused."""
    try:
        return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.PEM)
    except ValueError:
        raise Refused("not a certificate in PEM", code="bad_certificate") from None


def _authority(pair: Pair) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        ca = x509.load_pem_x509_certificate(pair.certificate)
        key = serialization.load_pem_private_key(pair.key, password=None)
    except (ValueError, TypeError):
        raise Refused("tls issue: the CA's certificate or key is not in PEM, or is encrypted") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
        raise Refused("tls issue: the CA's key does not belong to its certificate; `mlxrack-agent tls init` makes both")
    return ca, key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: dt.datetime, days: int
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - _EARLIER).not_valid_after(now + dt.timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _dns(name: str) -> x509.GeneralName:
    if not name or not name.isascii() or any(c.isspace() or c in "/:@" for c in name):
        raise Refused(f"tls issue: --name {name!r}: expected a DNS name like mini-1.local, without scheme and port")
    return x509.DNSName(name)


def _address(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        raise Refused(f"tls issue: --ip {text!r}: expected an address like 10.0.0.5") from None


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Pair(certificate.public_bytes(pem), private)
