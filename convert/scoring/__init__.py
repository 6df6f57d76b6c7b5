"""Which heads a hybrid has to keep: how much each query head of a teacher matters, by several methods."""
