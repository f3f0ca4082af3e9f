"""What the queue decides, without doing it: no clock, no chance, no I/O."""
