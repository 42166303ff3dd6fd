"""`python -m graphopt.cli`, as the script does it."""

from graphopt.cli import main

main()
