"""`python -m entropy_core.demo` makes the demo run."""

import sys

from entropy_core.demo.run import main

sys.exit(main())
