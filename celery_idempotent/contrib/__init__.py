"""What connects the queue log with other people's tools. Each module needs an extra of its own, and imports its library on first use."""
