"""What a message is: its id, its arguments' canonical form, its header, and how it is serialized."""
