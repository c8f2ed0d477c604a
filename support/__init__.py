"""What the two scripts use. They import it first, and on a Python that the pins do not know it ends them in one line."""

import sys

if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    found = f"{sys.version_info[0]}.{sys.version_info[1]}"
    print(
        f"error: the pinned packages are for Python 3.10 to 3.13, and this is {found}: use one of those.",
        file=sys.stderr,
    )
    sys.exit(2)
