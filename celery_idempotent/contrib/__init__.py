"""Integrations with other tools. Each module needs its own extra, and imports its library on first use."""
