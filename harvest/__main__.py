"""`python -m harvest` is the `harvest` command."""

from granary import harvest_main

harvest_main()
