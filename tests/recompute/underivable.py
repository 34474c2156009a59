"""Numbers of the published JSON that are not recomputed, each with its reason."""

import re

WHY = {
    r"(placement|report/distribution)/(moves|short|settings|least|conclusions|shortages|spare|unsure)(/.*)?": (
        "proposals of the placement solver, and what follows from them"
    ),
    r"(placement|report/distribution)/(gap|score)": "how good the solver's proposal is by its own measure",
    r"(placement|report/distribution)/nodes/[^/]+/(speed|limit|load|load_after|held_after_bytes)": (
        "inputs of the solver: speed is estimated from models that several nodes serve, load is its demand"
    ),
    r"(report/)?evictions/remedies/\w+": "what to do follows from the solver's proposals",
    r"(uptime|report)/telemetry/(quarantined|foreign|undated|too_late)": (
        "objects that reading the bucket set aside; they are in no figure"
    ),
    r"report/recommendations/.*": "advice, which follows from the solver's proposals",
    r".*/change/(direct_)?terms/\w+": "how a change of price divides into causes; their sum is checked",
    r".*/factors/throttled_share": "input of the causes of a price change, weighted as these need it",
    r"report/thermal/nodes/[^/]+/cooler_c": "advice, for nodes at their limit or throttled too long",
    r"scorecard/[^/]+/target|report/scorecard/[^/]+/target": "copied from the configuration",
}
"""By a pattern of paths."""


def why(path: str) -> str:
    """The reason, or ""."""
    return next((reason for pattern, reason in WHY.items() if re.fullmatch(pattern, path)), "")
