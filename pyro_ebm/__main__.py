"""Lets ``python -m pyro_ebm`` run the command line."""

import sys

from pyro_ebm.cli import main

if __name__ == "__main__":
    sys.exit(main())
