"""README's picture: the quickstart's report in a browser.

    python -m benchmarks.screenshot

Needs Chromium; it draws the page without a window.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import RESULTS

SIZE = "1180,1330"


def main() -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "recipes.vision", "fit", "--test", "--config", "vision/quickstart"]
        subprocess.run(run, cwd=folder, check=True, capture_output=True)
        (page,) = Path(folder).glob("runs/vision/quickstart/*/report.html")
        quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        shot = [f"--window-size={SIZE}", f"--screenshot={RESULTS / 'report.png'}", page.as_uri()]
        subprocess.run([browser, *quiet, *shot], check=True, capture_output=True)


if __name__ == "__main__":
    main()
