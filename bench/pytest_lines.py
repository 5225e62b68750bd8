"""A pytest plugin that writes a line of JSON as a test begins and as it ends, so that a run that is cut loses none."""

import json
import os


def _say(**values) -> None:
    with open(os.environ["BENCH_TEST_LINES"], "a", encoding="utf-8") as stream:
        stream.write(json.dumps(values) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Note that a test began."""
    _say(begin=nodeid)


def pytest_runtest_logreport(report) -> None:
    """Note a test's outcome; of its set-up and tear-down only what went wrong, or skipped it."""
    if report.when == "call" or report.outcome != "passed":
        why = "" if report.outcome == "passed" else str(report.longrepr).strip().splitlines()[-1][:300]
        _say(test=report.nodeid, outcome=report.outcome, why=why)


def pytest_collectreport(report) -> None:
    """Note a file that could not be read."""
    if report.failed:
        _say(test=report.nodeid, outcome="failed", why=str(report.longrepr).strip().splitlines()[-1][:300])
