"""What `toolkit.watch` is made of."""
