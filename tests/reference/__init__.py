"""Slow, written-out reference computations that the tests compare the layers with."""
