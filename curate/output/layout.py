"""Where the parts of a selection lie: the one place that knows.

mixture.yaml         tokens of each domain, and why
data/mds/            mode samples: MDS folders, one a domain; dropped.parquet says why a sample is not in them
data/streams.yaml    mode weights: arguments of one Stream per domain
.../schedule.yaml    with phases: beside the folders, or instead of streams.yaml
scores.parquet       values of measured samples
TABLE.parquet        roll-ups, see `curate.tables`
report.html          for people; report_data/ is what it is made of
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SELECTIONS = "selections"
"""Folder of a run that holds its selections, where no other is named."""
STREAMS = "streams.yaml"
SCHEDULE = "schedule.yaml"
DROPPED = "dropped.parquet"


@dataclass(frozen=True)
class SelectionFolder:
    """A selection on disk.

    Args:
        root: its folder.
    """

    root: Path

    @property
    def mixture(self) -> Path:
        """Tokens of each domain, and why."""
        return self.root / "mixture.yaml"

    @property
    def scores(self) -> Path:
        """Values of measured samples."""
        return self.root / "scores.parquet"

    @property
    def report(self) -> Path:
        """The page."""
        return self.root / "report.html"

    @property
    def report_data(self) -> Path:
        """Folder of what the page is made of."""
        return self.root / "report_data"

    @property
    def report_facts(self) -> Path:
        """Facts of the report that are no tables."""
        return self.report_data / "report.json"

    @property
    def data(self) -> Path:
        """Folder of everything that a trainer reads."""
        return self.root / "data"

    @property
    def samples(self) -> Path:
        """MDS folders with exactly the mixture's samples."""
        return self.data / "mds"

    @property
    def dropped(self) -> Path:
        """Why each sample is not among them."""
        return self.samples / DROPPED

    def table(self, name: str) -> Path:
        """A roll-up."""
        return self.root / f"{name}.parquet"

    def samples_for(self, *, scheduled: bool) -> Path:
        """What a loader opens of the MDS folders."""
        return self.samples / SCHEDULE if scheduled else self.samples

    def weights_for(self, *, scheduled: bool) -> Path:
        """What a loader opens of the weighted streams."""
        return self.data / (SCHEDULE if scheduled else STREAMS)

    @property
    def training_data(self) -> Path:
        """What a trainer opens: samples before weights, phases before one mixture.

        Raises:
            FileNotFoundError: the selection wrote no data.
        """
        forms = [
            form(scheduled=scheduled) for form in (self.samples_for, self.weights_for) for scheduled in (True, False)
        ]
        present = [form for form in forms if form.exists()]
        if not present:
            raise FileNotFoundError(f"{self.data} holds no data")
        return present[0]


def newest_reported(folder: Path) -> SelectionFolder | None:
    """The selection at any depth below a folder whose report data was written last; none: there is none."""
    facts = folder.glob(f"**/{SelectionFolder(Path()).report_facts}")
    # of the same age (a copy of a run, a coarse clock): the last one by name
    newest = max(facts, key=lambda path: (path.stat().st_mtime_ns, path), default=None)
    return None if newest is None else SelectionFolder(newest.parents[1])
