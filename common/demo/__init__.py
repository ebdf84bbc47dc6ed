"""The built-in demo model (a 4 M parameter GPT-NeoX), its tokenizer, and the script that trained it."""
