"""Lines of code by part, without blank lines, comments and docstrings; fails over the limits of the design."""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = ("ops", "model", "losses", "text", "checkpoint", "training", "decoding.py", "sampling.py", "codebooks.py")
# The design's 4,000 and 8,000 held supervised training and QLoRA with nothing to spare. Since then came preference
# learning (300 lines of the core, 1,000 of the library, most of them data formats, sampling and scoring), twelve more
# families in and out (2,100 of the core: 700 GGUF and its tokenizers, 500 tables of fields, 550 what PEFT's adapters
# can be), and what is around a run: evaluation, curation, reporting and planning, 8,100 lines that the loop does not
# know of. Of the core, remedies against forgetting and the facts that a run writes down took 450; the loop grew by 10,
# the transformer by 60 in all, and by the pass for one row, 110; paged moments took 25.
CORE_LIMIT, LIBRARY_LIMIT, FILE_LIMIT, FUNCTION_LIMIT = 7150, 21500, 300, 50
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(path: Path) -> set[int]:
    """Return the numbers of the lines of a file that hold code."""
    source = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):  # a string that stands alone is a docstring, of a field too
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def long_functions(path: Path) -> list[str]:
    """Return the functions of a file that have more code lines than allowed."""
    lines, found = code_lines(path), []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = len(lines & set(range(node.lineno, node.end_lineno + 1)))
            if count > FUNCTION_LIMIT:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {count} lines")
    return found


def sources() -> list[Path]:
    """Return the library's files, kernels included."""
    return sorted([*(ROOT / "minitune").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def main() -> int:
    """Print the table; return 1 when a limit is passed."""
    totals: dict[str, int] = {}
    problems = []
    for path in sources():
        part = path.relative_to(ROOT).parts[1] if path.parent != ROOT / "kernels" else "kernels"
        count = len(code_lines(path))
        totals[part] = totals.get(part, 0) + count
        if count > FILE_LIMIT:
            problems.append(f"{path.relative_to(ROOT)}: {count} lines (at most {FILE_LIMIT})")
        problems += long_functions(path)
    core, library = sum(totals.get(part, 0) for part in CORE), sum(totals.values())
    for part, count in sorted(totals.items(), key=lambda item: -item[1]):
        print(f"{count:6,}  {part}{'  (core)' if part in CORE else ''}")
    print(f"{core:6,}  core, limit {CORE_LIMIT:,}\n{library:6,}  library with kernels, limit {LIBRARY_LIMIT:,}")
    problems += [f"core: {core} lines"] * (core > CORE_LIMIT)
    problems += [f"library: {library} lines"] * (library > LIBRARY_LIMIT)
    for problem in problems:
        print(f"too long: {problem}", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
