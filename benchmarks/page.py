"""How large a report is, and how long a browser takes to open it and its viewer.

    python benchmarks/page.py DERIVATIVES/sub-01.html [--repeat 5]

Headless Chromium without a GPU; a machine with one starts the viewer faster.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.reports.chromium import Chromium


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    print(f"{given.page.stat().st_size / 1e6:.1f} MB")
    for width in (1280, 390):
        for _ in range(given.repeat):
            with tempfile.TemporaryDirectory() as folder, Chromium(Path(folder)) as browser:
                browser.open(given.page, width)
                loaded = browser.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
                start = time.perf_counter()
                browser.evaluate("document.querySelector('.slot').scrollIntoView()")
                browser.wait("document.querySelector('#viewer').dataset.scan === '1'")
                viewer = time.perf_counter() - start
                print(f"{width} px wide: open {loaded:.2f} s, viewer {viewer:.2f} s later, errors {browser.errors}")


if __name__ == "__main__":
    main()
