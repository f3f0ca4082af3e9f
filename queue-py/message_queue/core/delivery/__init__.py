"""Who gets which message, and when: order, delays, leases, receipts, waiters."""
