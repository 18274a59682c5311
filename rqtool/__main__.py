"""`python -m rqtool` is the command `rqtool`."""

from __future__ import annotations

import sys

from rqtool.cli.main import run

sys.exit(run())
