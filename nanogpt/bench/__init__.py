"""Measuring: kernels, steps, communication, profiles."""
