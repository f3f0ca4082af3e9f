"""Where things live: queues hash to partitions, partitions to preference lists of nodes."""
