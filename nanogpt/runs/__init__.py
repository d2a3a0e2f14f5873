"""What a run leaves behind, its directory, log and metrics, and what is made from it: tables, plots, comparisons."""
