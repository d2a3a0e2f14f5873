"""Trying an idea: many runs and measurements on the GPUs of one machine, and what they say (`nanogpt experiment`).

- `measurements`: what can be measured of a recipe, by name
- `queues`: each GPU's measurements one after another, with a log and a result for each
- `comparison`: the idea against the base, seed by seed
- `ends`: several ends of one run
"""
