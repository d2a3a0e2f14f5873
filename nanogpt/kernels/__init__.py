"""The operations that decide how fast a step is, one file each, each beside its plain PyTorch equivalent."""
