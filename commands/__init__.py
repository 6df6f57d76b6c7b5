"""The commands of `hydrahead`: each parses, calls and prints, and imports what it needs when it runs."""
