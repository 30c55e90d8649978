"""A pass over the units of a build that another process can go on with: each is recorded when it is done."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quant.journal import Journal
from quant.method import Calibration
from quant.plan import Unit
from quant.staging import sync

Work = Callable[[Unit], Mapping[str, Any]]
"""Does one unit; gives a JSON value for each tensor that was done, by its name."""

_STATE = ".hidden"


class Pass:
    """The pass `name`, with what earlier processes did of it. `results`: by the names of the tensors done.

    calibration: its state, as it was after the last unit that is recorded, is kept in `directory`, and taken from
    there; a pass of which nothing is recorded begins with the state that it has.
    """

    def __init__(
        self,
        name: str,
        units: Sequence[Unit],
        journal: Journal,
        directory: Path,
        calibration: Calibration | None = None,
    ) -> None:
        self._name = name
        self._journal = journal
        self._directory = directory
        self._calibration = calibration
        records = [record for record in journal.records if record["pass"] == name]
        self.results: dict[str, Any] = {
            key: value for record in records for key, value in record["results"].items()
        }
        self.missing = [
            unit for unit in units if any(tensor.name not in self.results for tensor in unit.tensors)
        ]
        self._state: str | None = records[-1]["state"] if records else None
        if calibration is not None and self._state is not None and self.missing:
            calibration.restore(directory / self._state)

    def run(self, work: Work, before_record: Callable[[], None]) -> dict[str, Any]:
        """Do what is missing; returns all results. `before_record` puts on the disk what a unit has written."""
        for unit in self.missing:
            results = work(unit)
            before_record()
            before, self._state = self._state, self._save(unit)
            self._journal.add({"pass": self._name, "state": self._state, "results": results})
            if before not in (None, self._state):
                (self._directory / str(before)).unlink(missing_ok=True)
            self.results |= results
        self.missing = []
        return self.results

    def _save(self, unit: Unit) -> str | None:
        """Keep the calibration's state after a layer, under a name of its own; returns the name of the newest."""
        if self._calibration is None or unit.index is None:
            return self._state
        state = f"{self._name}-{unit.index}{_STATE}"
        self._calibration.save(self._directory / state)
        sync(self._directory / state)
        return state


def remove_states(directory: Path) -> None:
    """Remove what passes have kept of calibrations."""
    for path in directory.glob(f"*{_STATE}"):
        path.unlink()
