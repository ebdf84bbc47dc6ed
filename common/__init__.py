"""What both tools stand on: the store contract, files, models, texts, and how to talk to a person."""
