"""The noise mode in plain words: who is protected from whom, what both ε mean, what dropouts and colluders change.

What is said here is what PROTOCOL.md, section 14, proves. Numbers that a plan does not hold drop their clause.
"""

from __future__ import annotations

import math

from accord_simulations.report import _numbers as num
from accord_simulations.report._models import is_private, noise_mode
from accord_simulations.report._story import guard, plan_value, unit
from accord_simulations.report._view import Card
from accord_simulations.results import SimulationResult

Question = tuple[str, str]
HUGE = 1e6  # a factor above is named no more exactly

PROTECTS = {
    "site": "one record of a participant",
    "cohort": "one record of any participant",
    "participant": "a whole participant with all its records",
}
AGAINST = {
    "site": "everybody, even all other participants together",
    "cohort": "the coordinator, the public and as many colluding participants as the plan names",
    "participant": "the coordinator, the public and as many colluding participants as the plan names",
}
HOW = {
    "site": "every update carries all of the noise, added by its participant alone",
    "cohort": "every participant adds a share; only the sum is ever seen, and it carries all of the noise",
    "participant": "as cohort, around the whole update of a participant",
}


def promises(result: SimulationResult) -> list[Card]:
    """Both ε side by side, each with what it means; none without privacy."""
    mode = noise_mode(result)
    if not is_private(result) or mode not in PROTECTS:
        return []
    others = "If all other participants collude"
    if mode == "site":
        same = "The same: a participant’s own noise is all that its protection rests on."
        return [
            Card("Against everybody", _equals(result.epsilon), odds(result.epsilon, result)),
            Card(others, _equals(result.epsilon_all_collude), same),
        ]
    colluders = plan_value(result, "cohort", "colluders")
    with_some = f" and {num.plural(colluders, 'colluding participant')}" if colluders else ""
    weaker = f"Then a participant has its own share of the noise alone. {odds(result.epsilon_all_collude, result)}"
    return [
        Card(f"Against coordinator, public{with_some}", _equals(result.epsilon), odds(result.epsilon, result), "joint"),
        Card(others, _equals(result.epsilon_all_collude), weaker),
    ]


def _equals(value: float | None) -> str:
    return f"ε{num.JOIN}={num.JOIN}{num.epsilon(value)}"


def odds(epsilon: float | None, result: SimulationResult) -> str:
    """What an ε means: by which factor anything that is seen can change the odds that a unit was there."""
    if epsilon is None or not math.isfinite(epsilon):
        return "No bound can be stated."
    what = "a participant took part" if noise_mode(result) == "participant" else _was_there(result)
    factor = math.exp(min(epsilon, 50.0))
    if factor > HUGE:
        return f"In the worst case, whoever looks can be all but certain whether {what}: no useful bound."
    shown = num.epsilon(factor) if factor < HUGE else ""
    return (
        f"Whoever sees all of it, whatever else they know: the odds that {what} change by at most a factor of {shown} "
        f"(e to the ε), up to a chance of about {num.small(result.delta)}."
    )


def _was_there(result: SimulationResult) -> str:
    """`a given record was in the data`."""
    named = str(plan_value(result, "task", "unit") or "row")
    return "a given record was in the data" if named == "row" else f"a given {named.removeprefix('column:')} was there"


def explain(result: SimulationResult) -> list[Question]:
    """Questions of whoever answers for the data, and their answers; none without privacy."""
    mode = noise_mode(result)
    if not is_private(result) or mode not in PROTECTS:
        return []
    return [
        ("Who is protected?", _who(result, mode)),
        ("Against whom?", _whom(result, mode)),
        ("Who adds the noise?", _noise(result, mode)),
        ("What if participants drop out?", _dropout(result, mode)),
        ("Who would have to collude?", _collusion(result, mode)),
        ("What is not covered?", _gaps(result, mode)),
    ]


def _who(result: SimulationResult, mode: str) -> str:
    text = f"{unit(result)[:1].upper()}{unit(result)[1:]} of any participant"
    if mode == "participant":
        text = "A whole participant: whether it takes part at all, and everything in its records"
    return f"{text}. The model comes out nearly the same with and without, so nothing in it points there."


def _whom(result: SimulationResult, mode: str) -> str:
    text = f"The first ε holds {guard(result)}."
    if mode == "site":
        return f"{text} It does not rest on secure aggregation."
    secure = plan_value(result, "secure_aggregation", "mode")
    if secure == "malicious":
        return f"{text} Secure aggregation shows the coordinator one sum a round and no single update, even if it lies."
    if secure == "semi_honest":
        return f"{text} This needs a coordinator that follows the protocol (semi-honest secure aggregation)."
    return f"{text} This needs secure aggregation."


def _noise(result: SimulationResult, mode: str) -> str:
    members = _participants(result)
    if mode == "site":
        each = f", so the sum of {members} carries {members} times the variance that one needs" if members > 1 else ""
        return f"Every participant adds all of the noise to its own update before it leaves{each}."
    return (
        f"Each of {num.plural(members, 'participant')} adds a share of the noise to its update before it is masked. "
        "Only the sum can be opened, and the sum carries all of it: as much as one trusted party would have added, "
        f"without anybody who has to be trusted.{_surplus(result, members)}"
    )


def _surplus(result: SimulationResult, members: int) -> str:
    """What allowing for colluders costs."""
    colluders = plan_value(result, "cohort", "colluders")
    if not isinstance(colluders, int) or not 0 < colluders < members:
        return ""
    more = f"{100 * colluders / (members - colluders):.0f}{num.JOIN}%"
    return f" As the shares of {num.plural(colluders, 'colluder')} do not count, all add {more} more variance."


def _dropout(result: SimulationResult, mode: str) -> str:
    lost = sum(max(0, item.cohort - item.survivors) for item in result.rounds)
    here = f" In this run {num.plural(lost, 'update')} did not arrive." if lost else " In this run all updates arrived."
    if mode == "site":
        text = "Nothing changes for the others: every update that arrives carries its own noise. Who drops out in one "
        return f"{text}round can make up for it in a later one, and spends no more than planned.{here}"
    least, extra = plan_value(result, "cohort", "minimum"), plan_value(result, "run", "max_extra_attempts")
    some = f" ({num.count(least)} stay)" if isinstance(least, int) else ""
    text = (
        f"Add, then remove: every participant adds noise enough for the worst that the plan allows{some}. Once it is "
        "certain who stayed, the surplus is opened and taken away again. So the sum carries the planned noise whoever "
        "drops out: protection is not lost, and neither is accuracy. With fewer nothing is opened; the round is "
        "repeated with fresh noise and charged again"
    )
    reserve = f", for which {num.plural(extra, 'repetition')} are in the budget" if isinstance(extra, int) else ""
    return f"{text}{reserve}.{here}"


def _collusion(result: SimulationResult, mode: str) -> str:
    if mode == "site":
        return "It would not help: nobody else knows a participant’s noise. Both ε are the same."
    members, colluders = _participants(result), plan_value(result, "cohort", "colluders") or 0
    able = f"the coordinator and {num.plural(colluders, 'participant')}" if colluders else "the coordinator alone"
    least = num.plural(colluders + 1, "participant")
    return (
        f"The first ε holds even if {able} put together all they know. It takes {least} who tell the coordinator their "
        f"own noise to weaken it, a little with each; only if all {max(1, members - 1)} others do, the second ε is "
        "what is left. A plan with more cohort.colluders holds against more of them, for more noise."
    )


def _gaps(result: SimulationResult, mode: str) -> str:
    text = "Who takes part and when, and how long an answer takes."
    if result.population.get("tuned"):
        text += " What was tuned on these records beforehand: its choice is in no ε."
    text += " The divisor of updates: here the exact mean of the records; a deployment takes a rounded public figure."
    if mode == "participant":
        return f"{text} Records are protected as part of their participant."
    if (twice := result.epsilon_unit_at_two_sites) is not None:
        return (
            f"{text} Whoever has records at two participants is protected by ε = {num.epsilon(twice)} only, as both "
            "move the same sums. Nothing here finds out who that is: participants that share customers would have to "
            "divide them among themselves beforehand."
        )
    return f"{text} A person with several records is protected for each one alone, at one participant or at several."


def _participants(result: SimulationResult) -> int:
    return len(result.participants) or int(result.population.get("participants") or 0)
