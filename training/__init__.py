"""The stages that train a student."""
