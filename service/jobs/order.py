"""The order in which waiting jobs are claimed, without reading them all. Changes nothing.

Priority decides first, then recovering before queued. Within such a class the project with the fewest running jobs is
next, within the project the API key with the fewest, and age decides among equals. A job that a cap holds back has no
place: its turn comes when a running job of its project or key ends.

Claims change what they are decided by: each gives its project one more running job. So the n-th waiting job of a
project with r running ones is taken on turn r + n, and a place is counted turn by turn, from the sizes of the lines
and the few jobs at the same turn, with no list of the jobs between.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from sqlalchemy import func, select, text, tuple_
from sqlalchemy.orm import Session

from service.jobs.caps import Caps, caps_of
from service.jobs.phases import Phase, Queue
from service.jobs.tables import WAITING_SQL, Job

Cap = Literal["project_cap", "key_cap"]
Age = tuple[float, str]
"""queued_at and id: smaller is older."""

is_waiting = text(WAITING_SQL)
_STRETCH: Final = 32
"""Jobs of a line that are looked up together."""


class _Member(Protocol):
    """One of those that take turns."""

    @property
    def load(self) -> int:
        """Jobs that it has running; its first waiting one is taken on the turn of this number."""
        ...

    @property
    def size(self) -> int:
        """Waiting jobs that its caps let run."""
        ...

    def nth(self, index: int) -> Age:
        """The job that is taken when ``index`` others of the member were."""
        ...


@dataclass(frozen=True)
class _Name:
    """What the waiting jobs of one line have in common."""

    queue: str
    priority: int
    phase: str
    project: str
    api_key_id: str | None

    def condition(self) -> list[Any]:
        """Spelt as the index has it."""
        columns = (Job.queue, Job.priority, Job.phase, Job.project, Job.api_key_id)
        values = (self.queue, self.priority, self.phase, self.project, self.api_key_id)
        return [is_waiting, *(column == value for column, value in zip(columns, values, strict=True))]


class _Line:
    """Waiting jobs that only their age tells apart."""

    def __init__(self, s: Session, name: _Name, waiting: int, load: int, cap: int | None) -> None:
        self.name = name
        self.load = load
        self.size = _within(waiting, load, cap)
        self.is_cut = self.size < waiting
        self._session = s
        self._known: dict[int, Age] = {}
        self._index_of: dict[Age, int] = {}

    def nth(self, index: int) -> Age:
        if index not in self._known:
            # A claim wants heads only; the jobs of a page stand near each other, so that one look serves many.
            first, number = (0, 1) if index == 0 else (index - index % _STRETCH, _STRETCH)
            statement = select(Job.queued_at, Job.id).where(*self.name.condition())
            statement = statement.order_by(Job.queued_at, Job.id).offset(first).limit(number)
            rows = enumerate(self._session.execute(statement), first)
            self._known |= {place: (queued_at, job_id) for place, (queued_at, job_id) in rows}
            self._index_of = {age: place for place, age in self._known.items()}
            # Claimed between two statements (PostgreSQL): whatever follows is younger than everything.
            self._known.setdefault(index, (float("inf"), ""))
        return self._known[index]

    def index_of(self, age: Age) -> int:
        if age in self._index_of:
            return self._index_of[age]
        statement = select(func.count()).where(*self.name.condition(), tuple_(Job.queued_at, Job.id) < age)
        return self._session.scalars(statement).one()


class _Turns:
    """Members that take turns: the next job is always that of the one with the least load, the older among equals."""

    def __init__(self, members: Sequence[_Member], load: int = 0, cap: int | None = None) -> None:
        self.members = members
        self.load = load
        self.size = _within(sum(member.size for member in members), load, cap)

    def nth(self, index: int) -> Age:
        first = min(member.load for member in self.members)
        last = max(member.load + member.size for member in self.members)
        turns = range(first, last)
        turn = turns[bisect_right(turns, index, key=lambda turn: self._before(turn + 1))]
        ages = sorted(member.nth(turn - member.load) for member in self._at(turn))
        return ages[index - self._before(turn)]

    def index_of(self, member: _Member, index: int, age: Age) -> int:
        """How many jobs of all members are taken before the member's one of that index and age."""
        turn = member.load + index
        others = [other for other in self._at(turn) if other is not member]
        return self._before(turn) + sum(other.nth(turn - other.load) < age for other in others)

    def _before(self, turn: int) -> int:
        """Jobs taken on earlier turns."""
        return sum(min(max(0, turn - member.load), member.size) for member in self.members)

    def _at(self, turn: int) -> list[_Member]:
        """Members of which a job is taken on this turn."""
        return [member for member in self.members if 0 <= turn - member.load < member.size]


class ClaimOrder:
    """The order of one queue, at the moment of asking: every job's place were no running job to end meanwhile."""

    def __init__(self, s: Session, queue: str) -> None:
        columns = (Job.priority, Job.phase, Job.project, Job.api_key_id)
        waiting = select(*columns, func.count()).where(Job.queue == queue, is_waiting).group_by(*columns)
        sizes = {_Name(queue, *row[:4]): row[4] for row in s.execute(waiting)}
        self._classes: list[_Turns] = []
        self._lines: dict[_Name, tuple[int, _Turns, _Line]] = {}
        if not sizes:
            return
        loads = _running(s, queue)
        projects = {name.project for name in sizes}
        # A validation takes no GPU and ends soon: only what waits for a GPU is capped.
        caps = {project: caps_of(s, project) if queue == Queue.GPU else Caps() for project in projects}
        classes: defaultdict[tuple[int, bool], list[_Name]] = defaultdict(list)
        for name in sizes:
            classes[-name.priority, name.phase != Phase.RECOVERING].append(name)
        for key in sorted(classes):
            self._classes.append(self._class(s, classes[key], sizes, loads, caps))

    def _class(
        self,
        s: Session,
        names: list[_Name],
        sizes: dict[_Name, int],
        loads: Counter[tuple[str, str | None]],
        caps: dict[str, Caps],
    ) -> _Turns:
        """The jobs of one class; adds them to the loads, which the classes after it begin with."""
        members = []
        for project in sorted({name.project for name in names}):
            cap = caps[project]
            running = sum(load for (of, _), load in loads.items() if of == project)
            mine = [name for name in names if name.project == project]
            lines = [_Line(s, name, sizes[name], loads[project, name.api_key_id], cap.key_jobs) for name in mine]
            turns = _Turns(lines, running, cap.project_jobs)
            members.append(turns)
            for line in lines:
                self._lines[line.name] = (len(self._classes), turns, line)
                # Too much where the project's cap cut: it then has no room in any later class, whatever the keys have.
                loads[project, line.name.api_key_id] += line.size
        return _Turns(members)

    def first(self) -> str | None:
        """The job that the next claim takes; None: there is none that may run."""
        return next((turns.nth(0)[1] for turns in self._classes if turns.size), None)

    def ahead_of(self, job: Job) -> int | Cap | None:
        """How many claims come before the job's, or which cap holds it back; None: it does not wait any more."""
        name = _Name(job.queue, job.priority, job.phase, job.project, job.api_key_id)
        if name not in self._lines:
            return None
        number, project, line = self._lines[name]
        age = (job.queued_at, job.id)
        index = line.index_of(age)
        if index >= line.size:
            return "key_cap" if line.is_cut else None
        index = project.index_of(line, index, age)
        if index >= project.size:
            return "project_cap"
        earlier = sum(turns.size for turns in self._classes[:number])
        return earlier + self._classes[number].index_of(project, index, age)


def _within(waiting: int, load: int, cap: int | None) -> int:
    """How many of the waiting jobs may run beside those that do."""
    return waiting if cap is None else min(waiting, max(0, cap - load))


def _running(s: Session, queue: str) -> Counter[tuple[str, str | None]]:
    """Jobs with a lease, by project and key."""
    columns = (Job.project, Job.api_key_id)
    leased = select(*columns, func.count()).where(Job.queue == queue, Job.lease_until.is_not(None)).group_by(*columns)
    return Counter({(row[0], row[1]): row[2] for row in s.execute(leased)})
