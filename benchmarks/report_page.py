"""How large a page of rlhf report is, how long headless Chromium takes to load it, and what it looks like.

rlhf report runs/quickstart -o page.html
python -m benchmarks.report_page page.html --pictures FOLDER
"""

import argparse
import tempfile
from pathlib import Path

from tests.browser import Browser

LOOKS = [(width, dark) for width in (390, 1400) for dark in (False, True)]
LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="what rlhf report wrote")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write a picture of each look into it")
    return parser


def main() -> None:
    options = _parser().parse_args()
    print(f"{options.page}: {options.page.stat().st_size / 1e6:.2f} MB")
    for width, dark in LOOKS:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(Path(profile)) as browser:
            browser.look(width=width, dark=dark, phone=width < 500)
            seconds = []
            for _ in range(5):
                browser.open(options.page.resolve().as_uri())
                seconds.append(browser.run(LOADED) / 1000)
            look = f"{width}_{'dark' if dark else 'light'}"
            told = f"first {seconds[0]:.2f} s, then {min(seconds[1:]):.2f} to {max(seconds[1:]):.2f} s"
            print(f"{look}: {told}; {len(browser.said)} messages in the console", *browser.said, sep="\n  ")
            if options.pictures is not None:
                options.pictures.mkdir(parents=True, exist_ok=True)
                browser.picture(options.pictures / f"{look}.png")


if __name__ == "__main__":
    main()
