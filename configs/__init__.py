"""The shipped configurations, as package data."""
