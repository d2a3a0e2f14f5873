"""The command line: one thin file per command, without logic of its own. `main.py` lists the commands."""
