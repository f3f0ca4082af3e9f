"""What the node keeps: one segmented log, its index, recovery and compaction."""
