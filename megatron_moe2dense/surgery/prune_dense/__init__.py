"""A dense model to a smaller dense one (method.md section 6): importance from one calibration pass, then slices of every tensor."""
