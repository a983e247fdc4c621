"""Attention consistency: measure how a wrapper around a question moves attention, and train against it."""
