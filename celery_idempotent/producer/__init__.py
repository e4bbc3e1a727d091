"""The producer's side: record a call, in a transaction or at once, then publish it."""
