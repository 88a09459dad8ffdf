"""Programs that measure: quality on real data, speed against peers and against the limit."""
