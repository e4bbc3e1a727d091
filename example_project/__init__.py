"""A loan check: a customer asks, institutions answer, one message goes out and one filing is made. See README.md."""
