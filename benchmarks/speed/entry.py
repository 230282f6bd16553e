"""What every kind of measurement tells of one method on one workload."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Entry:
    """A method on a workload, and why nothing was measured where nothing was."""

    workload: str
    method: str
    title: str
    missing: str | None = None  # why it was left out
    failure: str | None = None  # the traceback, where it failed

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Any:
        return cls(**entry)
