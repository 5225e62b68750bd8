"""What `prepare` may be asked to do with rows before it writes them."""

from dataclasses import dataclass, field
from typing import Literal

from minitune.curation.cleaning import CleaningOptions
from minitune.curation.mixing import check_shares
from minitune.curation.splitting import fractions_of
from minitune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CurationOptions:
    """How rows are split, kept apart and mixed; the defaults change nothing but to split by hash."""

    clean: CleaningOptions = field(default_factory=CleaningOptions)
    """What to repair and to remove; what near duplicates are, in one split or between two."""
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, validation and test; one that is 0 is not written."""
    exact_sizes: bool = False
    """Meet these shares; without, a row's split is its own hash, which no other row can change."""
    stratify: str | None = None
    """Give every split its share of each value of this field, or of each answer: `answer`."""
    group: str | None = None
    """Keep all rows with one value of this field in one split; without, rows that ask the same."""
    golden: str | None = None
    """Keep apart this number of rows, or those whose questions this file holds, as golden.jsonl."""
    leaks: Literal["list", "remove"] = "list"
    """Only list rows that stand in a later split or an evaluation set too, or take them out of the earlier one."""
    evaluation_sets: str | tuple[str, ...] = ()
    """Files or fetched sets that must not be trained on either, as wiki-demo or [mine.jsonl,rotten_tomatoes:test]."""
    rehearsal: str | tuple[str, ...] = ()
    """General rows against forgetting, as alpaca-en-demo or [a.jsonl,b.jsonl]; for training only."""
    rehearsal_share: float | None = None
    """Their share of what is trained on; 0.2 where rehearsal is given."""
    safety: str | tuple[str, ...] = ()
    """Files of safety rows, as for rehearsal; for training only."""
    safety_share: float | None = None
    """Their share of what is trained on; 0.2 where safety is given."""
    share_of: Literal["rows", "target_tokens"] = "rows"
    """What shares and weights are counted in."""
    shortage: Literal["error", "less", "repeat"] = "error"
    """Of a source that is too small for its share: stop, take what there is, or repeat rows."""
    malformed: Literal["error", "drop"] = "error"
    """Stop at rows that cannot be read, or leave them out."""

    def __post_init__(self):
        """Refuse shares that are none, and options without what they belong to."""
        fractions_of(self.split)
        for role in ("rehearsal", "safety"):
            if getattr(self, f"{role}_share") is not None and not getattr(self, role):
                raise ConfigError(f"{role}_share is set without {role}, the files that it is a share of; give both")
        if self.exact_sizes and self.stratify is not None:
            raise ConfigError("exact_sizes is set beside stratify, which meets the sizes already; leave it out")
        check_shares({f"{role}_share": share for role, share in self.shares.items()})

    @property
    def shares(self) -> dict[str, float]:
        """Return the share of each role that has files."""
        given = {role: getattr(self, f"{role}_share") for role in ("rehearsal", "safety") if getattr(self, role)}
        return {role: 0.2 if share is None else share for role, share in given.items()}

    def files_of(self, name: str) -> tuple[str, ...]:
        """Return the files of an option that takes one or several."""
        value = getattr(self, name)
        return (value,) if isinstance(value, str) else tuple(value)
