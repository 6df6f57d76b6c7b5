"""The embedded teacher and how it was trained."""
