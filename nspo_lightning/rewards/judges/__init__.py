"""Judges made of models: classifiers and guards in this process, and servers."""
