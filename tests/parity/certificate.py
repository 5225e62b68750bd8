"""The certificate as a page: every case by every measure, the walks over config fields, and the planted bugs.

Numbers have one digit, so that a run elsewhere, whose sums are rounded in another order, changes few of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.parity.cases import CONTEXT, FAMILIES, LENGTH, ROPES, WINDOW, Case, main_cases
from tests.parity.fields import Verdict, walk, walked_cases
from tests.parity.measures import BAR, MEASURES, STEPS, certify
from tests.parity.mutants import MUTANTS, PATCHES, caught, patched

PAGE = Path(__file__).parents[1] / "PARITY.md"
_INTRODUCTION = f"""# Parity with transformers

Written by `make parity`, which fails where a number is above its bar. Versions: torch {version("torch").split("+")[0]},
transformers {version("transformers")}, PEFT {version("peft")}; CPU, one thread, fp32 on both sides.

Each row is a tiny random model that transformers drew and saved and that the engine loaded from that folder: weights
that keep activations near 1, norm weights 0.3 away from theirs, biases not zero, caps low enough to bite, multipliers
far from 1. Heads are written H/K, query heads over key/value heads; wide ones are not D/H wide. Texts have {LENGTH}
tokens, windows {WINDOW}, and the original context of scaled rope is {CONTEXT}: texts run beyond both.

Each number is the largest relative error |ours - theirs| / |theirs|, and the bar for all of them is {BAR:.0e}:

- **logits, hidden states**: of any token's vector; hidden states after each layer;
- **gradients**: of any parameter's, for a random projection of the logits;
- **cached**: a prompt read in two parts into the cache, then token by token; each answer against transformers' pass,
  without a cache, over all tokens until there;
- **one text**: the same for one text, whose tokens take the pass for one row (`model/single.py`) where rope does not
  depend on the text's length;
- **left padding**: the same for two rows of unequal length in one batch, against transformers' pass over each alone;
- **gradients, fp64**: the gradients with both models cast to fp64, to tell arithmetic from rounding. transformers takes
  rope's angles in fp32 all the same, the engine in fp64, which at position {LENGTH} alone is about 1e-06 of a turn's
  result; GPT-2 has no rope and agrees to the last digits;
- **{STEPS} full steps, {STEPS} LoRA steps**: the loss of any step of AdamW, with packed rows and the cross-entropy
  that never holds all logits on our side, document by document on theirs; adapters on every linear layer start from
  one draw, and PEFT has theirs.

`make test` repeats a share of this for every family, and adds what has no number here: config files as transformers 4
wrote them, config files that we write, greedy generation in batches, gradient checkpointing, weights in 4 bits, reward
heads.
"""
_FIELDS = """
## Config fields

Each field of transformers' config, set to another plausible value, is **used** (our logits change as transformers' do
with the changed config), **refused** (an error names the field, or lists the tensors that no longer fit), or
**without effect** on transformers' logits as on ours. One model of each config class, and those in which other fields
come to life; of the models for a kind of rope the fields that it depends on.

| model | used | refused | without effect |
|---|---|---|---|
"""
_MUTANTS = """
## Planted bugs

Our side reads the checkpoint as an engine with that bug would; then come the rows in which the error of the logits is
above the bar, and the smallest of these errors. The last bugs are planted in the engine's code, and the measure that
sees them is named.

| bug | caught by | smallest error |
|---|---|---|
"""


@dataclass
class Certificate:
    """All results, and what is wrong with them."""

    errors: dict[Case, dict[str, float]] = field(default_factory=dict)
    verdicts: dict[Case, list[Verdict]] = field(default_factory=dict)
    caught: dict[str, dict[str, float]] = field(default_factory=dict)
    """Mutant -> row -> error."""

    def problems(self) -> list[str]:
        """Return a line for each missed bar, wrong field and mutant that no row, or not every row, caught."""
        found = [
            f"{case.name}: {name} {error:.1e} is above {BAR:.0e}"
            for case, errors in self.errors.items()
            for name, error in errors.items()
            if not error <= BAR
        ]
        for case, verdicts in self.verdicts.items():
            found += [f"{case.name}: {v.path}: {v.found}" for v in verdicts if v.kind == "wrong"]
        for mutant in (*MUTANTS, *PATCHES):
            rows = self.caught.get(mutant.name, {})
            found += [f"{mutant.name}: no row has it"] * (not rows)
            found += [f"{mutant.name}: not seen by {row} ({e:.1e})" for row, e in rows.items() if not e > 10 * BAR]
        return found


def issue(say: Callable[[str], None] = lambda line: None) -> Certificate:
    """Run everything; `say` gets a line for each case."""
    made = Certificate()
    with TemporaryDirectory() as folder:
        for index, case in enumerate(FAMILIES + ROPES):
            made.errors[case] = certify(case, Path(folder) / str(index))
            say(f"{case.name}: {max(made.errors[case].values()):.0e}")
        for case in main_cases() + ROPES:
            for mutant, error in caught(case, Path(folder) / "mutants" / case.name).items():
                made.caught.setdefault(mutant, {})[_row(case)] = error
        for index, patch in enumerate(PATCHES):
            row = f"{patch.case}: {patch.measure}"
            made.caught.setdefault(patch.name, {})[row] = patched(patch, Path(folder) / "patches" / str(index))
        for case in walked_cases():
            made.verdicts[case] = walk(case, Path(folder) / "fields" / case.name)
            say(f"{case.name}: {len(made.verdicts[case])} fields")
    return made


def _row(case: Case) -> str:
    return case.name if case in ROPES else case.family


def _table(errors: dict[Case, dict[str, float]]) -> str:
    lines = ["| family | model | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 2) + "|"]
    for case, row in errors.items():
        cells = [f"{row[name]:.0e}" if row[name] <= BAR else f"**{row[name]:.1e}**" for name in MEASURES]
        lines.append(f"| {case.family} | {case.variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _fields_line(case: Case, verdicts: list[Verdict]) -> str:
    kinds = {
        kind: [f"`{v.path}`" for v in verdicts if v.kind == kind] for kind in ("used", "refused", "inert", "wrong")
    }
    wrong = f" **wrong: {', '.join(kinds.pop('wrong'))}**" if kinds["wrong"] else kinds.pop("wrong") or ""
    return f"| {case.name}{wrong} | " + " | ".join(", ".join(names) for names in kinds.values()) + " |"


def page(made: Certificate) -> str:
    """Return the page's Markdown."""
    families = {case: errors for case, errors in made.errors.items() if case in FAMILIES}
    ropes = {case: errors for case, errors in made.errors.items() if case in ROPES}
    mutants = [
        f"| {name} | {'; '.join(row for row, e in rows.items() if e > BAR)} | {min(rows.values()):.0e} |"
        for name, rows in made.caught.items()
    ]
    return (
        f"{_INTRODUCTION}\n## Families\n\n{_table(families)}\n## Kinds of rope\n\n{_table(ropes)}{_FIELDS}"
        + "\n".join(_fields_line(case, verdicts) for case, verdicts in made.verdicts.items())
        + f"\n{_MUTANTS}"
        + "\n".join(mutants)
        + "\n"
    )
