"""``python -m inform_rm.cli``, which is how ``accelerate launch -m`` starts a command."""

import sys

from inform_rm.cli import main

if __name__ == "__main__":
    sys.exit(main())
