"""Kills a fit on two processes at random moments; what it comes to as JSON.

Run as a script, since it forks.
"""

import sys

from fault_fit import compare

if __name__ == "__main__":
    compare(sys.argv[1], kills=5, world=2)
