"""What steps of one answer take, by the rows that they run as.

Everything but the plain step's own time is kept as a share of it, which holds from one answer to the next over a
prompt of about the same length. The line that wide steps lie on need not begin at the plain step: attention often
takes another way through more than one row. And where a graph is fitted to a number of rows, the first step of
another number takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_DECAY = 0.9
_SLOPE = 0.04  # of one row more, before any is measured
_SLOPE_WEIGHT = 16.0  # of it: that of four steps that differ by two rows
_LEVEL_WEIGHT = 0.5  # in steps, of wide ones that cost only the slope
_FIRST = 3  # plain steps that are timed before anything else is tried
_AGAIN = 1  # and where only their length is new
_FADED = 0.1
_STALE = 128  # steps after which the plain one is timed again
_OUTLIER = 2.0  # a step that took so many times what was expected was held up by something else


@dataclass(frozen=True, slots=True)
class CostShape:
    """Costs of steps as shares of the plain one, and of a change of the number of rows.

    Attributes:
        weight: Of the wide steps that were seen; the others are decaying sums over them.
        rows: Of their rows.
        cost: Of their costs.
        rows_rows: Of their rows squared.
        rows_cost: Of the products of both.
        change: Of another number of rows than the last step's, where that costs at all.
        age: Steps since a plain one was timed.
    """

    weight: float = 0.0
    rows: float = 0.0
    cost: float = 0.0
    rows_rows: float = 0.0
    rows_cost: float = 0.0
    change: float = 0.4
    age: int = 0

    def at(self, rows: int) -> float:
        """Return what a step of ``rows`` costs."""
        if rows == 1 or not self.weight:
            return 1.0 + _SLOPE * (rows - 1)
        mean, cost = self.rows / self.weight, self.cost / self.weight
        level = cost * self.weight + (1.0 + _SLOPE * (mean - 1)) * _LEVEL_WEIGHT
        variance = self.rows_rows / self.weight - mean**2
        covariance = self.rows_cost / self.weight - mean * cost
        # Where one width is all that was seen, half of what it costs is taken for the first row's.
        guess = 0.5 * (cost - 1.0) / (mean - 1.0)
        slope = (covariance * self.weight + guess * _SLOPE_WEIGHT) / (
            variance * self.weight + _SLOPE_WEIGHT
        )
        slope = min(max(slope, 0.0), 1.0)
        return max(level / (self.weight + _LEVEL_WEIGHT) + slope * (rows - mean), 1.0)

    def faded(self) -> CostShape:
        """Return the shape as a first guess elsewhere, which a few steps outweigh."""
        sums = (self.weight, self.rows, self.cost, self.rows_rows, self.rows_cost)
        weight, rows, cost, rows_rows, rows_cost = (_FADED * part for part in sums)
        return CostShape(weight, rows, cost, rows_rows, rows_cost, self.change)

    def seen(self, rows: int, cost: float) -> CostShape:
        """Return the shape after one more wide step."""
        return replace(
            self,
            weight=_DECAY * self.weight + 1,
            rows=_DECAY * self.rows + rows,
            cost=_DECAY * self.cost + cost,
            rows_rows=_DECAY * self.rows_rows + rows * rows,
            rows_cost=_DECAY * self.rows_cost + rows * cost,
        )


class StepCosts:
    """Running averages of the time of steps.

    Attributes:
        shape: What the next answer should know.
        rows: Of the last step, 0 before the first.
    """

    def __init__(
        self, shape: CostShape | None, *, changes: bool = False, elsewhere: bool = False
    ) -> None:
        """Begin with what earlier answers found.

        Args:
            shape: Of their costs.
            changes: Of the number of rows cost time.
            elsewhere: It was found over prompts of another length.
        """
        self.shape = shape or CostShape()
        self._wanted = _FIRST if shape is None else 0
        if shape is not None and elsewhere:
            self.shape, self._wanted = shape.faded(), _AGAIN
        self.rows = 0
        self._changes = changes
        self._plain: float | None = None  # seconds; from wide steps until a plain one is seen
        self._plain_steps = 0

    @property
    def wants_plain(self) -> bool:
        """Whether the plain step should be timed, which all others are measured by."""
        return self._plain_steps < self._wanted or self.shape.age > _STALE

    @property
    def change(self) -> float:
        """Seconds that another number of rows than the last costs."""
        return self.shape.change * self.at(1) if self._changes else 0.0

    def at(self, rows: int) -> float:
        """Return the seconds of a step of ``rows``; in plain steps before the first."""
        return (1.0 if self._plain is None else self._plain) * self.shape.at(rows)

    def add(self, rows: int, seconds: float) -> None:
        """Learn from a step."""
        changed, self.rows = self._changes and rows != self.rows, rows
        timed = rows == 1 and not changed
        self.shape = replace(self.shape, age=0 if timed else self.shape.age + 1)
        expected = self.shape.at(rows) + self.shape.change * changed
        if timed:
            self._plain_steps += 1
            if self._plain_steps == 1 or self._plain is None:
                self._plain = seconds
            else:
                share = max(1 / self._plain_steps, 1 - _DECAY)
                self._plain += share * (min(seconds, _OUTLIER * self._plain) - self._plain)
            return
        if self._plain is None or not self._plain_steps:
            guess = seconds / expected
            self._plain = guess if self._plain is None else (self._plain + guess) / 2
            return
        cost = min(seconds / self._plain, _OUTLIER * expected)
        if not changed:
            self.shape = self.shape.seen(rows, cost)
        elif rows == 1 or self.shape.weight:
            extra = min(max(cost - self.shape.at(rows), 0.0), 1.0)
            change = _DECAY * self.shape.change + (1 - _DECAY) * extra
            self.shape = replace(self.shape, change=change)
