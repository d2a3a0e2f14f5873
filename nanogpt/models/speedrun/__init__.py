"""The speedrun, about record 67 of the public history."""
