"""`python -m trioswap` is the same as `trioswap`."""

from trioswap.cli import main

main()
