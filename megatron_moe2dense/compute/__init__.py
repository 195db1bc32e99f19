"""What a stage outside the trainer computes on: the processes of its job, and the device of each."""
