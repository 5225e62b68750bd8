"""`python -m tests.parity`: run the whole certificate and write tests/PARITY.md; exits with 1 where a bar is missed."""

import sys

import torch

from tests.parity.certificate import PAGE, issue, page


def main() -> int:
    """Write the page and print what is wrong."""
    torch.set_num_threads(1)  # sums in one order
    made = issue(print)
    PAGE.write_text(page(made), encoding="utf-8")
    problems = made.problems()
    print("\n".join(problems) or f"all within the bar; written to {PAGE}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
