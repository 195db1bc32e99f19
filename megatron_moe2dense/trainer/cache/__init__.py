"""The offline teacher: its top-k log-probabilities on disk by sample number, written once and read in place of the model."""
