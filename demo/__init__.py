"""The embedded teacher and the main job on a small scale."""
