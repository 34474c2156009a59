"""API keys, tokens and private keys by the forms that their issuers give them. Pure.

The rules of kingfisher leave out what looks like an example by its entropy; these do not, and they find what it has no
rule for: a lone AWS key id, a private key without its last line, a token of a form that many services use.
"""

import re
from collections.abc import Iterator

_FORMS = r"""
    sk-(?:proj|svcacct|admin|None)-~{20,} sk-ant-~{20,} sk-or-v1-[a-f0-9]{32,} sk-@{20,}(?:-@+)* gsk_@{40,} xai-@{40,}
    pplx-@{40,} hf_@{30,} api_org_@{30,} r8_@{35,} fw_@{20,} nvapi-~{40,} csk-@{40,} tgp_v1_~{30,} jina_@{40,} pa-~{40,}
    lsv2_(?:pt|sk)_@{32}_@{10}

    gh[pousr]_@{36,} github_pat_\w{22,} gl(?:pat|ptt|dt|rt|cbt|soat|ft|imt|agent|oas|ffct)-~{20,} npm_@{36} pypi-~{50,}
    rubygems_[a-f0-9]{48} dckr_(?:pat|oat)_~{20,} oy2[a-z0-9]{43} ATBB@{24,} AT[AC]TT3~{50,}=? figd_~{30,}
    lin_api_@{30,} PMAK-[a-f0-9]{24}-[a-f0-9]{34} bkua_@{30,}

    (?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA)[A-Z0-9]{16} AIza~{35} GOCSPX-~{28} ya29\.~{20,} do[opr]_v1_[a-f0-9]{64}
    hv[sbr]\.~{20,} dp\.(?:pt|st|ct|sa|scim|audit)\.(?:\w+\.)?@{40,} dapi[a-f0-9]{32}(?:-\d)? glsa_@{32}_[a-f0-9]{8}
    glc_[A-Za-z0-9+/]{32,}={0,2} tskey-~{20,} ops_eyJ~{100,} sntry[su]_[A-Za-z0-9+/=_-]{40,} NRAK-[A-Z0-9]{27}
    NRII-~{32} HRKU-~{30,} pul-[a-f0-9]{40} @{14}\.atlasv1\.~{60,} CLOJARS_[a-z0-9]{60} AGE-SECRET-KEY-1[A-Z0-9]{58}
    phc_@{40,} age-secret-key-1[a-z0-9]{58} sbp_[a-f0-9]{40} sb_secret_~{20,} AccountKey=[A-Za-z0-9+/]{80,}={0,2}
    (?:SharedAccessKey|sig)=[A-Za-z0-9+/%]{40,}(?:={1,2}|%3[dD])

    xox[abeoprs]-[A-Za-z0-9-]{10,} xapp-\d-[A-Za-z0-9-]{20,} [sr]k_(?:live|test|prod)_@{10,} whsec_[A-Za-z0-9+/=]{24,}
    SG\.~{16,}\.~{32,} SK[a-f0-9]{32} key-[a-f0-9]{32} [a-f0-9]{32}-us\d{1,2} xkeysib-[a-f0-9]{64}-@{16}
    sq0(?:atp|csp|idp)-~{22,} EAAA~{56,} shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32} \d{8,10}:AA~{33} pat@{14}\.[a-f0-9]{64}
    [MNO]~{23,27}\.~{6}\.~{27,} secret_@{40,} ntn_@{40,} sl\.~{100,} EAA[A-Za-z0-9]{80,} 1//0~{35,}
    hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9/]{20,} discord(?:app)?\.com/api/webhooks/\d+/~{40,}

    eyJ~{10,}\.eyJ~{10,}(?:\.~*)? eyJ~{15,}\.~*\.~{10,}\.~{10,}\.~{10,}
"""
"""By line: companies' models; source code and packages; clouds; messages, payment, shops; JWTs. @ is a letter or a
digit, ~ one of these or _ or -."""
ISSUED = tuple(_FORMS.replace("~", "[A-Za-z0-9_-]").replace("@", "[A-Za-z0-9]").split())
STANDING_ALONE = rf"(?<![A-Za-z0-9])(?:{'|'.join(ISSUED)})"
"""What is a secret whatever stands around it."""
_KEY = re.compile(STANDING_ALONE)
_TOKEN = re.compile(r"[A-Za-z0-9_+/=.~$!@%^&*:-]{15,}")
"""Where a key may stand: looked at more closely, unlike most words."""
_PREFIXED = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z][A-Za-z0-9]{1,11}(?:[_-][A-Za-z0-9]{1,8}){0,2}[_-](?=([A-Za-z0-9]{28,}))\1"
)
"""A prefix and a long random part: what many services give out."""
BEGIN, END = (rf"-{{2,5}} ?{word} (?:[A-Z0-9]+ ){{0,4}}PRIVATE KEY(?: BLOCK)? ?-{{2,5}}" for word in ("BEGIN", "END"))
_HEADER = r"\s{0,8}(?:Proc-Type|DEK-Info|Version|Comment|Hash|X-[\w-]{1,40}): ?[^\n]{0,200}\n"
PRIVATE_KEY = re.compile(
    rf"{BEGIN}(?:(?:[^-]|-(?!-)){{0,20000}}{END}|(?:{_HEADER})*(?:\s{{0,8}}[A-Za-z0-9+/]{{20,}}={{0,2}})*"
    r"(?:\s{0,8}[A-Za-z0-9+/]{1,19}={1,2})?)"
)
"""From its first line to its last, or as far as it goes."""
_IN_URL = re.compile(r"://(?:[^\s/@:?#]{1,64}:([^\s/@?#]{1,256})|:([^\s/@?#:]{1,256}))@(?=[\w\[])")
_NO_PASSWORD = re.compile(r"[$<{\[*x.]*|(?:pass(?:word)?|port|secret|\d{1,5})", re.IGNORECASE)
_NAMED = re.compile(
    r"""(?:(?:api|access|secret|private|auth|client|encryption|signing|account)[\s_.-]?(?:access[\s_.-]?)?
    (?:key|token|secret)|passw(?:or)?d|passwort|mot[ ]de[ ]passe|passphrase|kennwort|\btoken|\bsecret|\bpwd|bearer)["']?
    (?:\s{0,3}(?:[:=]{1,2}>?|\bis\b)\s{0,3}|\s{1,3})["']?\Z""",
    re.IGNORECASE | re.VERBOSE,
)
_SIGN = re.compile(r"[:=]")
_NAMES = ("key", "token", "secret", "passw", "passe", "passphrase", "kennwort", "pwd", "bearer")
"""One of these is in whatever _NAMED matches."""
_DIGITS, _UPPER, _LOWER = (re.compile(one) for one in (r"[0-9]+", "[A-Z]", "[a-z]"))
_NAME_CHARS = 48
DER = re.compile(rb"\x30(?:[\x20-\x7f]|\x81.|\x82..)\x02\x01[\x00\x01]|openssh-key-v1\0", re.DOTALL)
"""How a private key begins that is not written as PEM."""


def secrets(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, what it is) of each."""
    small = text.lower() if any(one in text.lower() for one in _NAMES) else ""
    for token in _TOKEN.finditer(text):
        yield from _in_token(text, token.start(), token.end())
        if len(small) == len(text):
            yield from _named(text, small, token.start(), token.end())
    for match in PRIVATE_KEY.finditer(text) if "PRIVATE" in text else ():
        yield match.start(), match.start() + len(match.group().rstrip()), match.group()
    for match in _IN_URL.finditer(text):
        n = match.lastindex or 1
        if not _NO_PASSWORD.fullmatch(match[n]):
            yield match.start(n), match.end(n), match[n]


def _in_token(text: str, start: int, end: int) -> Iterator[tuple[int, int, str]]:
    for match in _KEY.finditer(text, start, end):
        yield match.start(), match.end(), match.group()
    for match in _PREFIXED.finditer(text, start, end):
        if _random(match[1]):
            yield match.start(), match.end(), match.group()


def _named(text: str, small: str, start: int, end: int) -> Iterator[tuple[int, int, str]]:
    """A value after the name of a setting, which stands before it or in the same token: password=..."""
    for begin in (start, *(sign.end() for sign in _SIGN.finditer(text, start, min(end, start + _NAME_CHARS)))):
        before, value = max(0, begin - _NAME_CHARS), text[begin : min(end, begin + 200)]
        named = len(value) >= 16 and any(one in small[before:begin] for one in _NAMES)
        if named and _NAMED.search(text, before, begin) and _random(value):
            yield begin, begin + len(value), value


def _random(text: str) -> bool:
    """Whether letters and digits are mixed as in a random text, not as in a word or a name."""
    runs = _DIGITS.findall(text)
    digits = sum(map(len, runs))
    mixed = digits >= 3 and len(runs) >= 3
    mixed = mixed or (len(text) >= 30 and digits > 0 and min(len(_UPPER.findall(text)), len(_LOWER.findall(text))) >= 5)
    return mixed and len(set(text)) >= 10 and text.isascii()
