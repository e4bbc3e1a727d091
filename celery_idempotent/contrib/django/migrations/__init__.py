"""Django's migrations of the queue log's table."""
