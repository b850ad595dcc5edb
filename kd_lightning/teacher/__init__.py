"""A frozen teacher, and caches of what it or a frozen backbone outputs."""
