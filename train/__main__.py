"""`python -m train` is the `train` command."""

from granary import train_main

train_main()
