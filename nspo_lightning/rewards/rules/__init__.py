"""Rewards and judges made of rules: patterns, labels, shapes, reference answers."""
