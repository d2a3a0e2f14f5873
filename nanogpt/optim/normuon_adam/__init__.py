"""NorMuon on banks of matrices, Adam on everything else."""
