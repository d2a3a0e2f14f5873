"""Static pages for people: the report of runs, and a leaderboard of submissions."""
