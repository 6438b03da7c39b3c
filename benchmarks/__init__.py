"""What jaxbn costs, beside its peers: time, memory, accuracy."""
