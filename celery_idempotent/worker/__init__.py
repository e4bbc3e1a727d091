"""The worker's side: admit a delivered message, run its body, end its claim."""
