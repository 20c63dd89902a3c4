"""What the tests cost: a table by file, from pytest's report.

pytest -n auto --junitxml=report.xml
python scripts/test_times.py report.xml            # or two reports: before and after
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

Times = dict[str, tuple[int, float]]


def read(path: Path) -> Times:
    """(tests, seconds of their set-up, call and tear-down) of each file, from a JUnit report; over all workers."""
    found: dict[str, list[float]] = defaultdict(list)
    for case in ET.parse(path).getroot().iter("testcase"):
        found[case.attrib["classname"]].append(float(case.attrib["time"]))
    return {name: (len(times), sum(times)) for name, times in found.items()}


def table(reports: list[Times]) -> Table:
    """The dearest files of the last report first; beside it the seconds of those before."""
    *before, now = reports
    total = sum(seconds for _, seconds in now.values())
    shown = Table("tests of", *["before"] * len(before), "tests", "seconds", "share", title=f"{total:,.0f} test-seconds")
    for column in shown.columns[1:]:
        column.justify = "right"
    for name in sorted({*now}.union(*before), key=lambda name: -now.get(name, (0, 0.0))[1]):
        count, seconds = now.get(name, (0, 0.0))
        earlier = [f"{report.get(name, (0, 0.0))[1]:,.0f}" for report in before]
        shown.add_row(name, *earlier, str(count), f"{seconds:,.0f}", f"{seconds / max(total, 1e-9):.0%}")
    return shown


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    Console(width=100).print(table([read(Path(path)) for path in sys.argv[1:]]))


if __name__ == "__main__":
    main()
