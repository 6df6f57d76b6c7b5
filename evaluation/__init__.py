"""Needles, text loss and pictures."""
