"""`hvdkit plan`: on how many workers, and by which way of all-reducing, training still pays; on paper."""
