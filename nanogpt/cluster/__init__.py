"""Clusters: nodes, jobs, the container, and the processes of a run."""
