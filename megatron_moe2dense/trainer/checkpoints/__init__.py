"""Saving a run and going on from it: complete, with checksums, in any layout."""
