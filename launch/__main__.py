"""`python -m launch` is the command `rlhf-ray`."""

import sys

from launch.cli import main

sys.exit(main())
