"""What models read: text, needles hidden in it, and mixtures of both."""
