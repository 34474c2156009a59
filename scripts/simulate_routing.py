"""``make simulate``: routing by estimated seconds, two random choices, least load and at random, on synthetic traffic.

Nodes are modelled as far as a router sees them: prompts are prefilled one after another at a given speed, rows decode
together, a prompt cache evicts the least recently used blocks. A gateway knows of a node its last heartbeat, up to a
second old, and what the gateway itself has sent since. The decisions are agent/gateway/routing.py's own.
"""

import heapq
import itertools
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from agent.gateway.routing import Local, RouteRequest, choose
from agent.process.prefixes import BLOCK_TOK
from agent.views import ModelView, NodeView
from scripts.common import arrivals, quantile

BEAT_S = 1.0
ROWS = 8
GAP_S = 0.03
PREFILL_TPS = 1500.0
Policy = Callable[[random.Random, RouteRequest, Sequence[NodeView]], str]


class Request(NamedTuple):
    """A request at a gateway: block numbers of its prompt (an earlier turn's first) and the length of its answer."""

    at_s: float
    gateway: int
    blocks: tuple[int, ...]
    answer_tok: int

    @property
    def prompt_tok(self) -> int:
        """Length of the prompt."""
        return len(self.blocks) * BLOCK_TOK


@dataclass
class Node:
    """One machine; ``speed`` is relative to the usual one."""

    name: str
    speed: float = 1.0
    cache_blocks: int = 2000
    free_s: float = 0.0
    rows: list[float] = field(default_factory=list)
    waiting: list[tuple[float, int]] = field(default_factory=list)
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    work_s: float = 0.0
    served: int = 0
    cached_tok: int = 0

    def take(self, request: Request) -> tuple[float, float]:
        """Answer a request; returns the times of its first and last token."""
        known = prefix_blocks(request.blocks, self.cache)
        self.keep(request.blocks)
        self.served += 1
        self.cached_tok += known * BLOCK_TOK
        while self.rows and self.rows[0] <= request.at_s:
            heapq.heappop(self.rows)
        row_s = heapq.heappop(self.rows) if len(self.rows) >= ROWS else request.at_s
        fresh_tok = max(1, request.prompt_tok - known * BLOCK_TOK)
        prefill_s = fresh_tok / (PREFILL_TPS * self.speed)
        self.free_s = first_s = max(request.at_s, self.free_s, row_s) + prefill_s
        step_s = GAP_S / self.speed * (1.0 + min(len(self.rows) + 1, ROWS) / ROWS)
        last_s = first_s + request.answer_tok * step_s
        heapq.heappush(self.rows, last_s)
        self.waiting.append((first_s, fresh_tok))
        self.work_s += prefill_s + request.answer_tok * GAP_S / self.speed / ROWS * 2
        return first_s, last_s

    def keep(self, blocks: Sequence[int]) -> None:
        """Put blocks into the prompt cache."""
        for block in reversed(blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.cache_blocks:
            self.cache.popitem(last=False)

    def heartbeat(self, now_s: float, running: int) -> NodeView:
        """Its heartbeat."""
        self.waiting = [one for one in self.waiting if one[0] > now_s]
        view = ModelView(
            name="m",
            version="v",
            ready=True,
            in_flight=running,
            rows=ROWS,
            prefill_tok=sum(tokens for _, tokens in self.waiting),
            prefill_tps=PREFILL_TPS * self.speed,
            gap_us=int(GAP_S * 1e6 / self.speed),
            answer_tok=150,
        )
        return NodeView(
            node=self.name, url=self.name, models=(view,), hop_s=0.001, known={"m": frozenset(list(self.cache)[-1024:])}
        )


class Outcome(NamedTuple):
    """A trace under a policy."""

    first_token_s: list[float]
    nodes: list[Node]
    best_cached_tok: int

    @property
    def cached(self) -> float:
        """Share of the best possible cached tokens."""
        return sum(node.cached_tok for node in self.nodes) / max(1, self.best_cached_tok)

    @property
    def unevenness(self) -> float:
        """The most work of a node, relative to the mean; work is scaled by speed."""
        work = [node.work_s for node in self.nodes]
        return max(work) / statistics.mean(work)

    def p95(self) -> float:
        """TTFT, p95."""
        return quantile(self.first_token_s, 0.95)


class Measured(NamedTuple):
    """A policy's row: share of the best possible cached tokens and TTFT, p95, with conversations; max by mean work with
    one hot prompt; shares of work at speeds 1, 2 and 4; the largest part of a burst by the fair share."""

    cached: float
    p95_s: float
    unevenness: float
    shares: tuple[float, ...]
    burst: float


HERE = NodeView(node="gateway")


def prefix_blocks(blocks: Sequence[int], held: Container[int]) -> int:
    """How many of the first blocks are held."""
    return next((n for n, block in enumerate(blocks) if block not in held), len(blocks))


def by_seconds(rng: random.Random, request: RouteRequest, nodes: Sequence[NodeView]) -> str:
    """Compare all nodes."""
    place = choose(request, HERE, nodes).place
    assert not isinstance(place, Local)
    return getattr(place, "node", nodes[0].node)


def by_two(rng: random.Random, request: RouteRequest, nodes: Sequence[NodeView]) -> str:
    """Compare two random nodes."""
    return by_seconds(rng, request, rng.sample(list(nodes), min(2, len(nodes))))


def by_load(rng: random.Random, request: RouteRequest, nodes: Sequence[NodeView]) -> str:
    """The node with the fewest requests."""
    loads = [node.models[0].in_flight + request.sent.get(node.node, (0, 0))[0] for node in nodes]
    least = [node for node, load in zip(nodes, loads, strict=True) if load == min(loads)]
    return rng.choice(least).node


def at_random(rng: random.Random, request: RouteRequest, nodes: Sequence[NodeView]) -> str:
    """A random node."""
    return rng.choice(list(nodes)).node


POLICIES: dict[str, Policy] = {
    "by seconds": by_seconds,
    "two choices": by_two,
    "least load": by_load,
    "random": at_random,
}


def play(
    requests: Sequence[Request], nodes: Sequence[Node], policy: Policy, *, gateways: int, seed: int = 1
) -> Outcome:
    """Replay a trace under a policy."""
    rng = random.Random(seed)
    by_name = {node.name: node for node in nodes}
    running: list[tuple[float, str]] = []
    views: dict[tuple[int, str], NodeView] = {}
    heartbeats: dict[tuple[int, str], float] = {
        (d, n.name): rng.random() * BEAT_S for d in range(gateways) for n in nodes
    }
    sent: list[dict[str, tuple[int, int]]] = [{} for _ in range(gateways)]
    firsts: list[float] = []
    seen: set[int] = set()
    best = 0
    for request in requests:
        now = request.at_s
        while running and running[0][0] <= now:
            heapq.heappop(running)
        for key, due in heartbeats.items():
            if due <= now or key not in views:
                gateway, name = key
                views[key] = by_name[name].heartbeat(now, sum(one == name for _, one in running))
                heartbeats[key] = now + BEAT_S - (now - due) % BEAT_S if due <= now else due
                sent[gateway].pop(name, None)
        best += prefix_blocks(request.blocks, seen) * BLOCK_TOK
        seen.update(request.blocks)
        asked = RouteRequest(
            model="m",
            chain=request.blocks,
            prompt_tok=request.prompt_tok,
            answer_tok=request.answer_tok,
            sent=dict(sent[request.gateway]),
            draw=rng.random(),
        )
        name = policy(rng, asked, [views[(request.gateway, node.name)] for node in nodes])
        count, tokens = sent[request.gateway].get(name, (0, 0))
        sent[request.gateway][name] = (count + 1, tokens + request.prompt_tok)
        first_s, last_s = by_name[name].take(request)
        firsts.append(first_s - now)
        heapq.heappush(running, (last_s, name))
    return Outcome(firsts, list(nodes), best)


# ---- traces ----


def conversations(seed: int, *, count: int = 500, per_s: float = 1.0, gateways: int = 8) -> list[Request]:
    """Conversations of several turns, each turn at a random gateway; five applications with a system prompt each."""
    rng, found, fresh = random.Random(seed), [], iter(range(10**9))
    systems = [[next(fresh) for _ in range(12)] for _ in range(5)]
    for at_s in itertools.islice(arrivals(rng, per_s), count):
        turn_s, blocks = at_s, list(rng.choice(systems))
        for _ in range(rng.randint(2, 8)):
            blocks += [next(fresh) for _ in range(rng.randint(1, 5))]
            answer = rng.randint(50, 250)
            found.append(Request(turn_s, rng.randrange(gateways), tuple(blocks), answer))
            blocks += [next(fresh) for _ in range(answer // BLOCK_TOK)]
            turn_s += answer * GAP_S + rng.expovariate(1 / 10.0)
    return sorted(found)


def hot_prompt(seed: int, *, count: int = 3000, per_s: float = 12.0, gateways: int = 8) -> list[Request]:
    """One system prompt for all requests, short questions."""
    rng, fresh = random.Random(seed), iter(range(10**9))
    system = [next(fresh) for _ in range(24)]
    return [
        Request(at_s, rng.randrange(gateways), (*system, next(fresh)), rng.randint(50, 250))
        for at_s in itertools.islice(arrivals(rng, per_s), count)
    ]


def steady(seed: int, *, count: int = 3000, per_s: float = 8.0, gateways: int = 3) -> list[Request]:
    """Requests without common prefixes."""
    rng, found, fresh = random.Random(seed), [], iter(range(10**9))
    for at_s in itertools.islice(arrivals(rng, per_s), count):
        blocks = tuple(next(fresh) for _ in range(rng.randint(2, 12)))
        found.append(Request(at_s, rng.randrange(gateways), blocks, rng.randint(50, 250)))
    return found


def bursts(seed: int, *, count: int = 40, size: int = 64, gateways: int = 8) -> list[Request]:
    """``size`` simultaneous requests through all gateways, then none until all are answered."""
    rng, fresh = random.Random(seed), iter(range(10**9))
    return [
        Request(60.0 * n, k % gateways, tuple(next(fresh) for _ in range(4)), rng.randint(50, 150))
        for n in range(count)
        for k in range(size)
    ]


def most_of_a_burst(
    requests: Sequence[Request], policy: Policy, *, nodes: int = 8, gateways: int = 8, seed: int = 1
) -> float:
    """The most that one node received of any burst, relative to its fair share."""
    worst = 0.0
    for at_s in sorted({one.at_s for one in requests}):
        burst = [one for one in requests if one.at_s == at_s]
        machines = [Node(f"n{n}") for n in range(nodes)]
        play(burst, machines, policy, gateways=gateways, seed=seed + int(at_s))
        worst = max(worst, max(node.served for node in machines) / (len(burst) / nodes))
    return worst


def measured(policy: Policy, seed: int = 11) -> Measured:
    """One policy on all traces."""
    talk = play(conversations(seed), [Node(f"n{n}") for n in range(8)], policy, gateways=8)
    hot = play(hot_prompt(seed), [Node(f"n{n}") for n in range(8)], policy, gateways=8)
    speeds = [Node("n1", 1.0), Node("n2", 2.0), Node("n3", 4.0)]
    play(steady(seed), speeds, policy, gateways=3)
    total = sum(node.work_s * node.speed for node in speeds)
    shares = tuple(node.work_s * node.speed / total for node in speeds)
    return Measured(talk.cached, talk.p95(), hot.unevenness, shares, most_of_a_burst(bursts(seed), policy))


def line(name: str, one: Measured) -> str:
    """A row of the table."""
    share = " ".join(f"{each:.2f}" for each in one.shares)
    return f"{name:<14}{one.cached:<10.0%}{one.p95_s:<24.2f}{one.unevenness:<24.2f}{share:<20}{one.burst:.2f}"


def lines() -> Iterator[str]:
    """The table."""
    yield f"{'':<14}{'conversations':<34}{'hot prompt':<24}{'speeds 1:2:4':<20}bursts"
    yield f"{'policy':<14}{'cached':<10}{'TTFT, p95':<24}{'max/mean work':<24}{'share of work':<20}most / fair"
    for name, policy in POLICIES.items():
        yield line(name, measured(policy))


def main() -> None:
    """Print the table."""
    for line in lines():
        print(line)


if __name__ == "__main__":
    main()
