"""After training: population statistics and folding, for arrays."""
