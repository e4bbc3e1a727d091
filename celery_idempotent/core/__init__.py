"""What everything else stands on: the records, the decision, and the port of the store. Nothing here knows a task."""
