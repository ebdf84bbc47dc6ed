"""`harvest`: a language model and a corpus in, an activation store out. Start reading at `run.py`."""
