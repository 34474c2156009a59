"""Whether to buy: current API cost against the cost of nodes, month by month, within what the nodes can carry. Pure.

Break-even is the month in which cumulative savings reach the initial payment. Money is Decimal; the running cost of a
node is power, other costs and, if given, staff. Hardware is paid at the start; its residual value is reported, not
counted. What is to move beyond the capacity of the nodes stays at the API.
"""

from datetime import datetime

import msgspec

from aggregator.economics import sentences, verdict
from aggregator.economics.capacity import CLASSES, bought
from aggregator.economics.inputs import Inputs, settle
from aggregator.economics.verdict import Economics

__all__ = ["CLASSES", "Economics", "Inputs", "bought", "judge"]


def judge(inputs: Inputs, at: datetime, configured_rate: float | None = None) -> Economics:
    """Verdict, break-even, the cumulative curve and its sensitivity, with API prices of that time; ``configured_rate``
    is the currency per US dollar where none was given. Raises Refused."""
    report = verdict.concluded(settle(inputs, at, configured_rate))
    return msgspec.structs.replace(report, sentence=sentences.verdict(report), rule_of_thumb=sentences.rule(report))
