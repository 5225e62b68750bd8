"""What a rule of the doctor says: a cause by name, the evidence from a file of the run, and the remedy.

`strength` orders causes, and decides what is an alarm (`ALARM` or more) and what only worth knowing. It is a rank by
kind and not a probability: how a run ended comes before what was wrong with its data, that before how it was optimised,
and that before what came of it, since the earlier explains the later. Within a kind the worse case comes first.
"""

from dataclasses import dataclass

ALARM = 0.5
END, DATA, COURSE, RESULT, NOTE = 0.95, 0.8, 0.65, 0.5, 0.1  # the weakest of each kind
_ROOM = 0.14  # between the weakest and the strongest of a kind


@dataclass(frozen=True)
class Finding:
    """A likely cause; `evidence` begins with the file that it was read in."""

    name: str
    evidence: str
    remedy: str
    strength: float

    @property
    def alarm(self) -> bool:
        """Whether this is a fault, and not only worth knowing."""
        return self.strength >= ALARM


def ranked(kind: float, severity: float = 0.5) -> float:
    """Return the strength of a finding of a kind; `severity` runs from 0 to 1, beyond that it counts as 1."""
    return kind if kind == END else kind + _ROOM * min(max(severity, 0.0), 1.0)
