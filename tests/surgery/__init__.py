"""Tests of the surgery."""
