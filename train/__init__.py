"""`train`: an activation store in, sparse autoencoders out. Start reading at `trainer.py`."""
