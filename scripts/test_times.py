"""The seconds of a test run by file, a table.

    pytest -n auto --junitxml report.xml && python scripts/test_times.py report.xml

An earlier report before it is set beside it. Seconds are of tests with their set-up, added up over the workers.
"""

import argparse
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path


def by_file(report: Path) -> tuple[Counter[str], Counter[str]]:
    """(seconds, tests), by file within tests/."""
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        parts = case.get("classname", "").split(".")  # of the module, and of a class in it
        name = "/".join(parts).removeprefix("tests/")
        seconds[name] += float(case.get("time", 0))
        tests[name] += 1
    return seconds, tests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="one, or the one before and the one after")
    parser.add_argument("--least", type=float, default=1.0, help="seconds from which a file has a row of its own")
    options = parser.parse_args()
    *_, (seconds, tests) = found = [by_file(report) for report in options.reports]
    files = sorted({name for each, _ in found for name in each}, key=lambda name: -max(each[name] for each, _ in found))
    shown = [name for name in files if max(each[name] for each, _ in found) >= options.least]
    rows = [(name, [name]) for name in shown]
    rows += [(f"{len(files) - len(shown)} others", [name for name in files if name not in shown]), ("all", files)]
    before = ["seconds before"] if len(found) > 1 else []
    print("| " + " | ".join(["file", "tests", *before, "seconds", "share"]) + " |")
    print("|" + "---|" * (4 + len(before)))
    for title, names in rows:
        sums = [sum(each[name] for name in names) for each, _ in found]
        share = sums[-1] / max(sum(seconds.values()), 1e-9)
        cells = [title, sum(tests[name] for name in names), *(f"{s:,.0f}" for s in sums), f"{share:.0%}"]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
