"""What a run needs while it runs: launcher, ranks, watchdog, signals, page cache."""
