"""AdamW, for the GPT-2 baseline."""
