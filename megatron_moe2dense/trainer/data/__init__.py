"""Training text: token files, mixtures, samples by number, and this rank's micro-batches."""
