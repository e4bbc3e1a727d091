"""Maintain the queue log: recovery passes, rescue, purge and requeue."""
