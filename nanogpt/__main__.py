"""`python -m nanogpt` and `torchrun -m nanogpt`: the command line."""

from nanogpt.cli.main import main

main()
