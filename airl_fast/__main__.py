"""``python -m airl_fast`` is ``airl-fast``."""

import sys

from airl_fast.cli import main

sys.exit(main())
