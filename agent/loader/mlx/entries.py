"""What a batch is given for one row: the tokens to compute, the state that they follow, and how tokens are drawn."""

from functools import partial

import mlx.core as mx

from agent.loader.mlx import kv, sampling
from agent.loader.mlx.batch import Entry
from agent.loader.mlx.constraint import Constraint
from agent.loader.mlx.model import TextModel
from agent.loader.mlx.row import Row


def entry(model: TextModel, row: Row, layers: kv.Layers, cached_tok: int) -> Entry:
    """A row's input after the ``cached_tok`` tokens that ``layers`` cover."""
    tokens = row.prompt + row.made
    request, position = row.request, len(row.made)
    return Entry(
        fresh=tokens[cached_tok:],
        held=tokens[:cached_tok],
        layers=layers,
        max_tokens=row.max_tokens - position,
        sampler=sampling.sampler(request, position),
        processors=[_guarded(row, process) for process in processors(model, row)],
    )


def processors(model: TextModel, row: Row) -> list[sampling.Processor]:
    """A row's logits processors; created again when a batch is rebuilt."""
    request, extra, begin = row.request, row.extra, len(row.prompt)
    found: list[sampling.Processor] = []
    if request.repetition_penalty != 1.0:
        found.append(sampling.repetition(request.repetition_penalty, request.repetition_window_tok))
    if request.frequency_penalty or request.presence_penalty:
        found.append(sampling.penalty(request.frequency_penalty, request.presence_penalty, begin))
    if request.logit_bias:
        found.append(sampling.bias(request.logit_bias))
    if request.ignore_eos and extra.plan.whole is None:  # where a grammar is complete, only an end token is allowed
        found.append(sampling.never(model.ends))
    if extra.plan.whole is not None or extra.plan.announced is not None:
        thought, text, matcher = extra.markers.reasoning, model.text_of, partial(model.matcher, request.cache)
        found.append(Constraint(extra.plan, begin, model.ends, matcher, text, thought, inside=extra.inside))
    return found


def _guarded(row: Row, process: sampling.Processor) -> sampling.Processor:
    """A row whose processor raises fails alone; the batch continues with the row's unchanged logits."""

    def guarded(tokens: mx.array, logits: mx.array) -> mx.array:
        try:
            return process(tokens, logits)
        except Exception as error:  # noqa: BLE001  # a grammar may reject its input
            row.broken = row.broken or error
            return logits

    return guarded
