"""A dense model to a smaller dense one (method.md section 8): importance from one calibration pass, then slices of every tensor."""
