"""What a run leaves behind: its directory, log and metrics, and what is made of them: tables, plots, references."""
