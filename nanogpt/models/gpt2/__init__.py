"""The classic GPT-2 124M, a baseline."""
