"""`python -m nspo_lightning compare`: methods, seeds, learning rates and sweeps of one configuration, in one table.

Every run is a plain `fit` with a few settings changed, so whatever a figure shows can be run alone. One direction:
methods and sweeps make a plan, workers run it (`Trajectory` measures along the way and keeps what the selection rule
prefers), the report reads results from disk and writes table, pictures and TensorBoard.
"""
