"""What brings the queue log in order: rescue, relay, purge and requeue."""
