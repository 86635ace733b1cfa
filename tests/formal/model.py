"""Secure aggregation as symbols: every state that a hostile coordinator can bring honest sites into.

In the manner of Dolev and Yao (1983): cryptography is perfect, and the coordinator is the network. It asks any honest
site anything that it can put together, at any time: any round and attempt, any cohort, model and bundles (genuine,
of an earlier session, forged), any introduction, any survivor set, any certificate for which it has the signatures.
It holds the corrupt sites: their keys, the shares dealt to them, and their signatures under everything.
`explore` walks through all reachable states, breadth first, and stops at the first that breaks an invariant.

**Terms.** A context (`ctx`) is a tuple of what was shown, as in PROTOCOL.md, section 7: attempt, cohort, model,
bundles. Two sites derive the same seed s_uv if they have the same ctx, both saw the other's genuine bundle, and both
have the genuine introduction; a site whose bundle *or* introduction of a peer was forged has a seed that it shares
with nobody; where *both* were forged, the coordinator has it. A sealed share opens for its receiver under that
same equality. A signature is the tuple (signer, ctx, U).

**What the coordinator computes.** An upload is y_u = x_u + b_u ± Σ s_uv. A seed is known if t_share holders opened
their shares of it (corrupt ones always have), or if the coordinator has the key. Each b_u masks one upload and each
s_uv at most two, with opposite signs. Drop uploads with an unknown b_u; draw an edge for each unknown s_uv between the
two uploads that it masks. The combinations of updates that can be computed are the left kernel of this graph's
incidence matrix: spanned by *the sums over components*, without those in which a seed leads nowhere. `sums` finds them.

**Without loss of generality** the coordinator passes on every genuine blob and all signatures that it has (more
knowledge never hurts it, and no check of a site refuses more of them), uploads are learned at once, and honest sites
are interchangeable (states that differ by a renaming are one).

**Sparse graphs** (section 9). `World.graph` says whom each site chose. The coordinator shows each site any of `tables`
of choices, and introduces it to any of its partners. One graph stands for all: that a graph is good enough is not the
model's matter (`graph.py`, `tests/unit/test_graph.py`), but that the masks and shares are those of *this* graph is.

**Limits.** A few sites, two attempts, one corrupt site fixed in advance. Nothing about computation,
guessing, wrong shares by corrupt sites (they spoil a sum), lengths, timing, or the code (`tests/adversarial`). A site
that restarts is one that the coordinator no longer asks; only what it must not forget (R10) is modelled. R1 and R6 and
most of R3 are about public constants, which the model has only one of.

Each rule of section 8 that can be violated by a message is a switch in `RULES`: without it, the model has to find
an attack, or show that the others are enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from itertools import combinations, permutations, product
from typing import Any, NamedTuple

GENUINE, OLD, FORGED = "genuine", "old", "forged"

RULES = {
    "R2 order": "(round, attempt) is greater than the last",
    "R2 opened": "no attempt of a round after it opened one",
    "R2 cohort": "a further attempt asks no site outside the first one's cohort",
    "R3 minimum": "the cohort has at least n_min sites",
    "R4 own": "its own bundle is one it made",
    "R4 session": "a bundle is of the session that was introduced",
    "R4 signature": "a bundle is signed",
    "R5 introduction": "introductions are signed",
    "R5 chosen": "whom it chose is introduced",
    "R5 choosers": "who chose it is introduced",
    "one draw": "a site that rejoins has the neighbours that it had",
    "roster": "it chooses k of the roster, not of a shorter list",
    "R7 minimum": "at least n_min survivors",
    "R7 self": "it is a survivor itself",
    "R8 same": "the set that is opened is the one it signed",
    "R8 quorum": "t_sign signatures",
    "R9 once": "one survivor set signed per attempt",
    "R10 durable": "that it opened a round survives a restart",
    "ctx signed": "survivor sets are signed together with ctx",
    "ctx salt": "pair keys are derived with ctx",
    "ctx choices": "all choices of the cohort are in ctx, its own as it made it",
}

Set = frozenset[int]


class Context(NamedTuple):
    """What a site was shown; equal for two sites only if all of it is."""

    slot: int
    cohort: tuple[int, ...]
    model: int
    bundles: tuple[str, ...]
    """Of each honest site of the run: which of its keys is shown."""
    choices: tuple[Set, ...] = ()
    """Sparse graph: whom each site chose."""


class View(NamedTuple):
    """A context, and which introductions the site has (not part of ctx: they are secrets of pairs)."""

    ctx: Context
    introduced: tuple[str, ...]
    choices: tuple[Set, ...] = ()
    """Sparse graph: the choices that are shown."""
    told: Set = frozenset()
    """Sparse graph: partners that are introduced."""


class Site(NamedTuple):
    """An honest site. `done` is all that it ever sent: ("upload" or "again", view), ("sign" or "open", view, U)."""

    last: int = -1
    opened: Set = frozenset()
    """Rounds of which it remembers that it opened an attempt."""
    view: View | None = None
    """The attempt whose secrets it has in memory."""
    signed: Set | None = None
    done: frozenset[tuple[Any, ...]] = frozenset()

    def sent(self, kind: str) -> Iterator[tuple[Any, ...]]:
        return (event for event in self.done if event[0] == kind)


State = tuple[Site, ...]
"""Honest sites 0, 1, …; what the coordinator knows follows from what they sent."""
Step = tuple[str, State]


class Broken(Exception):
    """A state that breaks an invariant."""


@dataclass(frozen=True)
class World:
    """A configuration: who there is, the thresholds, what the coordinator may name, and the rules in force."""

    honest: int
    corrupt: int
    minimum: int
    sign: int
    share: int
    rounds: tuple[int, ...] = (1, 1)
    """The round of each attempt (slot)."""
    cohorts: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Cohorts that may be named in each slot; by default all sites."""
    models: int = 1
    tampering: bool = False
    """Whether bundles and introductions are tampered with: the largest part of what can be sent."""
    signatures: bool = True
    """False is `semi_honest`: no trip 2."""
    off: frozenset[str] = frozenset()
    graph: tuple[Set, ...] = ()
    """Whom each site chose; complete if empty. No corrupt sites then."""
    redrawn: tuple[Set, ...] = ()
    """Whom each would choose another time."""
    short: tuple[Set, ...] = ()
    """Whom each would choose of a shorter list."""
    silent: Set = frozenset()
    """Sites that never answer."""
    named: tuple[Set, ...] = ()
    """Survivor sets that may be named; by default all."""

    def without(self, *rules: str) -> World:
        """The same world with rules switched off."""
        assert set(rules) <= set(RULES)
        return replace(self, off=self.off | set(rules))

    def has(self, rule: str) -> bool:
        return rule not in self.off

    @property
    def everyone(self) -> tuple[int, ...]:
        return tuple(range(self.honest + self.corrupt))

    def cohorts_of(self, slot: int) -> tuple[tuple[int, ...], ...]:
        return self.cohorts[slot] if self.cohorts else (self.everyone,)

    def is_honest(self, site: int) -> bool:
        return site < self.honest

    def thresholds(self, cohort: tuple[int, ...]) -> tuple[int, int]:
        """(t_sign, t_share): never more than there are sites."""
        return min(self.sign, len(cohort)), min(self.share, len(cohort))

    @cached_property
    def views(self) -> tuple[View, ...]:
        """All that a request of trip 1 may show."""
        if self.graph:
            return self._sparse_views()
        bundles = list(product((GENUINE, OLD, FORGED), repeat=self.honest)) if self.tampering else []
        introduced = list(product((GENUINE, FORGED), repeat=self.honest)) if self.tampering else []
        plain = [(GENUINE,) * self.honest]
        return tuple(
            View(Context(slot, cohort, model, shown), secrets)
            for slot in range(len(self.rounds))
            for cohort in self.cohorts_of(slot)
            for model in range(self.models)
            for shown in bundles or plain
            for secrets in introduced or plain
        )

    def _sparse_views(self) -> tuple[View, ...]:
        """Every mixture of true and other choices, and every part of the sites as introduced."""
        genuine = (GENUINE,) * self.honest
        either = [dict.fromkeys(pair) for pair in zip(self.graph, self.redrawn, strict=True)]
        tables = {self.short, *product(*either)}
        parts = [frozenset(p) for n in range(self.honest + 1) for p in combinations(self.everyone, n)]
        return tuple(
            View(Context(0, self.everyone, 0, genuine, table if self.has("ctx choices") else ()), genuine, table, part)
            for table in sorted(tables, key=repr)
            for part in parts
        )

    def partners(self, who: int, view: View) -> Set:
        """M_u, as far as the coordinator lets it be."""
        if not self.graph:
            return frozenset(view.ctx.cohort) - {who}
        return _linked(who, view.choices) & view.told

    def holders(self, who: int, view: View) -> Set:
        """Who gets shares of a site's secrets."""
        if not self.graph:
            return frozenset(view.ctx.cohort)
        return view.choices[who] & view.told | {who}

    @cached_property
    def sets(self) -> dict[tuple[int, ...], tuple[Set, ...]]:
        """All survivor sets of each cohort."""
        cohorts = {cohort for slot in range(len(self.rounds)) for cohort in self.cohorts_of(slot)}
        if self.named:
            return dict.fromkeys(cohorts, self.named)
        return {
            cohort: tuple(frozenset(part) for size in range(1, len(cohort) + 1) for part in combinations(cohort, size))
            for cohort in cohorts
        }

    @cached_property
    def renamings(self) -> tuple[tuple[int, ...], ...]:
        """Permutations of the honest sites that leave the cohorts of every slot as they are."""
        if self.graph:
            return (self.everyone,)
        fixed = range(self.honest, self.honest + self.corrupt)
        whole = [(*order, *fixed) for order in permutations(range(self.honest))]
        named = [frozenset(map(frozenset, self.cohorts_of(slot))) for slot in range(len(self.rounds))]
        keeps = [
            all(frozenset(frozenset(p[i] for i in cohort) for cohort in slot) == slot for slot in named) for p in whole
        ]
        return tuple(p for p, kept in zip(whole, keeps, strict=True) if kept)


def _linked(who: int, choices: tuple[Set, ...]) -> Set:
    """Whom a site chose, and who chose it."""
    return choices[who] | frozenset(peer for peer, chosen in enumerate(choices) if who in chosen)


# --- what an honest site answers (PROTOCOL.md, section 8)


def accepts(world: World, who: int, site: Site, view: View) -> bool:
    """Trip 1: R2 to R5."""
    ctx, around = view.ctx, world.rounds[view.ctx.slot]
    if who not in ctx.cohort or (world.has("R2 order") and ctx.slot <= site.last):
        return False
    if world.has("R2 opened") and around in site.opened:
        return False
    earlier = [e[1].ctx for e in site.sent("upload") if world.rounds[e[1].ctx.slot] == around]
    if world.has("R2 cohort") and earlier:
        first = min(earlier, key=lambda each: each.slot)
        if not set(ctx.cohort) <= set(first.cohort):
            return False
    if world.has("R3 minimum") and len(ctx.cohort) < world.minimum:
        return False
    if world.has("R4 own") and ctx.bundles[who] != GENUINE:
        return False
    return all(_peer_is_good(world, view, peer) for peer in ctx.cohort if world.is_honest(peer) and peer != who)


@cache
def _good_graphs(world: World, who: int) -> tuple[View, ...]:
    return tuple(view for view in world.views if _graph_is_good(world, who, view))


def _graph_is_good(world: World, who: int, view: View) -> bool:
    """R5 on a sparse graph; what others would be told in vain is left out (`told` are partners)."""
    chosen, linked = view.choices[who], _linked(who, view.choices)
    possible, needed = {world.graph[who]}, set[int]()
    if not world.has("one draw"):
        possible.add(world.redrawn[who])
    if not world.has("roster"):
        possible.add(world.short[who])
    if world.has("R5 chosen"):
        needed |= chosen
    if world.has("R5 choosers"):
        needed |= {peer for peer in linked if who in view.choices[peer]}
    return chosen in possible and needed <= view.told <= linked


def _peer_is_good(world: World, view: View, peer: int) -> bool:
    bundle, introduction = view.ctx.bundles[peer], view.introduced[peer]
    if world.has("R4 session") and bundle == OLD:
        return False
    if world.has("R4 signature") and bundle == FORGED:
        return False
    return not (world.has("R5 introduction") and introduction == FORGED)


def good_set(world: World, who: int, view: View, survivors: Set) -> bool:
    """R7."""
    if world.has("R7 self") and who not in survivors:
        return False
    return not world.has("R7 minimum") or len(survivors) >= world.minimum


def uploads(world: World, who: int, site: Site) -> Iterator[tuple[str, Site]]:
    """Trip 1; whatever attempt was open is abandoned."""
    for view in _good_graphs(world, who) if world.graph else world.views:
        if accepts(world, who, site, view):
            done = site.done | {("again" if ("upload", view) in site.done else "upload", view)}
            yield f"upload {_shown(view)}", Site(max(site.last, view.ctx.slot), site.opened, view, None, done)


def signs(world: World, who: int, site: Site) -> Iterator[tuple[str, Site]]:
    """Trip 2."""
    if site.view is None or (site.signed is not None and world.has("R9 once")) or not world.signatures:
        return
    for survivors in world.sets[site.view.ctx.cohort]:
        if good_set(world, who, site.view, survivors) and survivors != site.signed:
            done = site.done | {("sign", site.view, survivors)}
            yield f"sign {_named(survivors)}", site._replace(signed=survivors, done=done)


def opens(world: World, who: int, state: State) -> Iterator[tuple[str, Site]]:
    """Trip 3; the secrets of the attempt are dropped."""
    site = state[who]
    if site.view is None:
        return
    for survivors in world.sets[site.view.ctx.cohort]:
        if not _may_open(world, who, state, survivors):
            continue
        opened = site.opened | {world.rounds[site.view.ctx.slot]}
        done = site.done | {("open", site.view, survivors)}
        yield f"open {_named(survivors)}", Site(site.last, opened, None, None, done)


def _may_open(world: World, who: int, state: State, survivors: Set) -> bool:
    site = state[who]
    assert site.view is not None
    if not world.signatures:
        return good_set(world, who, site.view, survivors)
    if survivors != site.signed and (world.has("R8 same") or not good_set(world, who, site.view, survivors)):
        return False
    enough, _ = world.thresholds(site.view.ctx.cohort)
    return not world.has("R8 quorum") or len(signers(world, state, site.view.ctx, survivors)) >= enough


def signers(world: World, state: State, ctx: Context, survivors: Set) -> Set:
    """Whose signature under this set the coordinator can show: those who gave it, and the corrupt ones."""
    bound = world.has("ctx signed")
    willing = (
        who
        for who, site in enumerate(state)
        if any(u == survivors and (view.ctx == ctx or not bound) for _, view, u in site.sent("sign"))
    )
    return frozenset(who for who in willing if who in ctx.cohort) | (frozenset(ctx.cohort) - set(range(world.honest)))


def steps(world: World, state: State) -> Iterator[Step]:
    """Everything that can happen next."""
    for who, site in enumerate(state):
        if who in world.silent:
            continue
        moves = [*uploads(world, who, site), *signs(world, who, site), *opens(world, who, state)]
        if not world.has("R10 durable") and site.opened:
            moves.append(("restart", site._replace(opened=frozenset(), view=None, signed=None)))
        for what, after in moves:
            yield f"{_name(who)}: {what}", (*state[:who], after, *state[who + 1 :])


# --- what the coordinator then knows


def seed(world: World, who: int, peer: int, view: View) -> tuple[object, ...] | None:
    """s_uv as `who` derives it: a term, or None if the coordinator has it."""
    salt = view.ctx if world.has("ctx salt") else view.ctx.cohort
    if not world.is_honest(peer):
        return None
    forged = (view.ctx.bundles[peer] == FORGED, view.introduced[peer] == FORGED)
    if all(forged):
        return None
    if any(forged) or OLD in (view.ctx.bundles[peer], view.ctx.bundles[who]) or view.ctx.bundles[who] == FORGED:
        return ("lone", who, peer, view)
    return ("pair", frozenset((who, peer)), salt)


Upload = tuple[int, View]


def sums(world: World, state: State) -> tuple[Set, ...]:
    """The least sums of updates that the coordinator computes (module docstring), each as the set of its sites."""
    return _sums(world, tuple(frozenset(e for e in site.done if e[0] in ("upload", "open")) for site in state))


@lru_cache(maxsize=1 << 14)
def _sums(world: World, done: tuple[frozenset[Any], ...]) -> tuple[Set, ...]:
    state = tuple(Site(done=events) for events in done)
    sent: list[Upload] = [(who, event[1]) for who, site in enumerate(state) for event in site.sent("upload")]
    known = _known(world, state, sent)
    plain = [upload for upload in sent if ("self", *upload) in known]
    masks = {upload: _masks(world, upload) - known for upload in plain}
    parts: list[tuple[set[Upload], set[object]]] = []
    for upload in plain:
        part, odd = {upload}, set(masks[upload])
        for other in [each for each in parts if any(masks[upload] & masks[u] for u in each[0])]:
            parts.remove(other)
            part |= other[0]
        for each in part - {upload}:
            odd |= masks[each]
        parts.append((part, odd))
    whole = [part for part, odd in parts if all(sum(mask in masks[u] for u in part) == 2 for mask in odd)]
    return tuple(frozenset(who for who, _ in part) for part in whole)


def _masks(world: World, upload: Upload) -> set[object]:
    who, view = upload
    terms = (seed(world, who, peer, view) for peer in world.partners(who, view))
    return {term for term in terms if term is not None}


def _known(world: World, state: State, sent: list[Upload]) -> set[object]:
    """Seeds that t_share holders opened."""
    known: set[object] = set()
    for dealer, view in sent:
        _, enough = world.thresholds(view.ctx.cohort)
        partners = [peer for peer in sorted(world.partners(dealer, view)) if world.is_honest(peer)]
        own, pairs = 0, dict.fromkeys(partners, 0)
        for holder in sorted(world.holders(dealer, view)):
            answers = _answers(world, state, dealer, view, holder)
            own += any(dealer in u for u in answers)
            for peer in partners:
                pairs[peer] += any(dealer in u and peer not in u for u in answers)
            if _has_all(world, dealer, view, holder):
                own, pairs = own + 1, {peer: count + 1 for peer, count in pairs.items()}
        if own >= enough:
            known.add(("self", dealer, view))
        known |= {seed(world, dealer, peer, view) for peer, count in pairs.items() if count >= enough}
    return known


def _has_all(world: World, dealer: int, view: View, holder: int) -> bool:
    """Whether the coordinator itself opens what `dealer` sealed for `holder`."""
    return holder != dealer and seed(world, dealer, holder, view) is None


def _answers(world: World, state: State, dealer: int, view: View, holder: int) -> list[Set]:
    """The sets for which an honest holder opened what `dealer` sealed for it in this attempt."""
    if not world.is_honest(holder) or _has_all(world, dealer, view, holder):
        return []
    opened = [(seen, u) for _, seen, u in state[holder].sent("open")]
    if holder == dealer:
        return [u for seen, u in opened if seen == view]
    key = seed(world, dealer, holder, view)
    same = [(seen, u) for seen, u in opened if seen.ctx == view.ctx and dealer in world.partners(holder, seen)]
    return [u for seen, u in same if seed(world, holder, dealer, seen) == key]


# --- invariants


def authentic(world: World, state: State) -> None:
    """No honest site derives a pair key from anything but the named honest peer's newest session."""
    for who, site in enumerate(state):
        for _, view in site.sent("upload"):
            peers = [peer for peer in view.ctx.cohort if world.is_honest(peer)]
            if any(view.ctx.bundles[peer] != GENUINE for peer in peers):
                raise Broken(f"{_name(who)} uses a key that was not made for it")
            if any(view.introduced[peer] != GENUINE for peer in peers if peer != who):
                raise Broken(f"{_name(who)} has a secret that its peer did not make")


def fresh(world: World, state: State) -> None:
    """Nobody masks two uploads under one context, and a signature counts in its own attempt only."""
    for who, site in enumerate(state):
        if any(site.sent("again")):
            raise Broken(f"{_name(who)} masks twice with the same seeds")
        for _, view, survivors in site.sent("open"):
            for signer in signers(world, state, view.ctx, survivors) & set(range(world.honest)):
                if not any(v.ctx == view.ctx and u == survivors for _, v, u in state[signer].sent("sign")):
                    raise Broken(f"{_name(signer)}'s signature of another attempt was accepted")


def one_set(world: World, state: State) -> None:
    """At most one survivor set can be certified per context."""
    for ctx in {view.ctx for site in state for _, view in site.sent("upload")}:
        enough, _ = world.thresholds(ctx.cohort)
        certified = [u for u in world.sets[ctx.cohort] if len(signers(world, state, ctx, u)) >= enough]
        if len(certified) > 1:
            raise Broken(f"two sets are certified: {_named(certified[0])} and {_named(certified[1])}")


def enough(world: World, state: State) -> None:
    """No sum of fewer honest updates than n_min − c."""
    for part in sums(world, state):
        if len(part) < world.minimum - world.corrupt:
            raise Broken(f"the sum over {_named(part)} alone is known")


def one_sum(world: World, state: State) -> None:
    """Of one round, an update is in at most one sum: there is nothing to subtract."""
    for around in set(world.rounds):
        only = tuple(_in_round(world, site, around) for site in state)
        parts = sums(world, only)
        for one, other in combinations(parts, 2):
            if one & other and one != other:
                raise Broken(f"two sums of one round: {_named(one)} and {_named(other)}")


def _in_round(world: World, site: Site, around: int) -> Site:
    return site._replace(done=frozenset(e for e in site.done if world.rounds[e[1].ctx.slot] == around))


Invariant = Callable[[World, State], None]
INVARIANTS: tuple[Invariant, ...] = (authentic, fresh, one_set, enough, one_sum)


# --- exploration


@dataclass(frozen=True)
class Attack:
    """How an invariant breaks."""

    invariant: str
    what: str
    trace: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.invariant}: {self.what}", *(f"  {n}. {s}" for n, s in enumerate(self.trace, 1))])


@dataclass(frozen=True)
class Result:
    """What an exploration saw: states up to renaming, steps, sums that were opened; and an attack, if there is one."""

    states: int
    steps: int
    learned: frozenset[Set]
    attack: Attack | None


def explore(world: World, invariants: tuple[Invariant, ...] = INVARIANTS) -> Result:
    """All reachable states, breadth first; a shortest attack, if any."""
    start: State = (Site(),) * world.honest
    canonical = _canonical(world)
    paths: dict[tuple[int, ...], tuple[tuple[int, ...] | None, str]] = {canonical(start): (None, "")}
    queue = deque([(start, canonical(start))])
    taken, learned = 0, set[Set]()
    while queue:
        state, key = queue.popleft()
        for what, after in steps(world, state):
            taken += 1
            name = canonical(after)
            if name in paths:
                continue
            paths[name] = (key, what)
            try:
                _check(world, invariants, after)
            except Broken as broken:
                invariant, said = broken.args
                return Result(len(paths), taken, frozenset(learned), Attack(invariant, said, _trace(paths, name)))
            learned |= set(sums(world, after))
            queue.append((after, name))
    return Result(len(paths), taken, frozenset(learned), None)


def _check(world: World, invariants: tuple[Invariant, ...], state: State) -> None:
    for invariant in invariants:
        try:
            invariant(world, state)
        except Broken as broken:
            raise Broken(invariant.__name__, str(broken)) from None


def _canonical(world: World) -> Callable[[State], tuple[int, ...]]:
    """The least of a state's renamings, as numbers of interned sites."""
    numbers: dict[Site, int] = {}

    @cache
    def number(site: Site, p: tuple[int, ...]) -> int:
        return numbers.setdefault(_renamed_site(site, p), len(numbers))

    orders = [(p, tuple(sorted(range(world.honest), key=p.__getitem__))) for p in world.renamings]

    def canonical(state: State) -> tuple[int, ...]:
        return min(tuple(number(state[i], p) for i in back) for p, back in orders)

    return canonical


def _renamed_site(site: Site, p: tuple[int, ...]) -> Site:
    def of(u: Set | None) -> Set | None:
        return None if u is None else frozenset(p[i] for i in u)

    done = frozenset((e[0], _renamed_view(e[1], p), *(of(u) for u in e[2:])) for e in site.done)
    view = None if site.view is None else _renamed_view(site.view, p)
    return Site(site.last, site.opened, view, of(site.signed), done)


@cache
def _renamed_view(view: View, p: tuple[int, ...]) -> View:
    def moved(values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(value for _, value in sorted(zip(p, values, strict=False)))

    slot, cohort, model, bundles, _ = view.ctx
    if view.choices:
        return view  # a graph has no renamings here
    return View(
        Context(slot, tuple(sorted(p[i] for i in cohort)), model, moved(bundles)),
        moved(view.introduced),
    )


def _trace(paths: dict[tuple[int, ...], tuple[tuple[int, ...] | None, str]], at: tuple[int, ...]) -> tuple[str, ...]:
    said: list[str] = []
    key: tuple[int, ...] | None = at
    while key is not None:
        key, what = paths[key]
        said.append(what)
    return tuple(said[-2::-1])


def _name(site: int) -> str:
    return f"site {site}"


def _named(sites: Set) -> str:
    return "{" + "".join(map(str, sorted(sites))) + "}"


def _shown(view: View) -> str:
    tampered = [
        f"{_name(i)}'s {what} {value}"
        for what, values in (("bundle", view.ctx.bundles), ("introduction", view.introduced))
        for i, value in enumerate(values)
        if value != GENUINE
    ]
    where = f"attempt {view.ctx.slot}, cohort {_named(frozenset(view.ctx.cohort))}, model {view.ctx.model}"
    return ", ".join([where, *tampered])
