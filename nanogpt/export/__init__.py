"""A run's model as other people's software reads it: safetensors, config, tokenizer, model card."""
