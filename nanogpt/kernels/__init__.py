"""The operations that decide the speed of a step, one file each, every one beside its plain PyTorch equal."""
