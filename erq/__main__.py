"""`python -m erq` is the command `erq`."""

from erq.cli import main

main()
