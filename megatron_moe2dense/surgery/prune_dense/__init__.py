"""A dense model to a smaller dense one (docs/method.md#the-dense-to-dense-baseline): importance from one calibration pass, then slices
of every tensor."""
