"""No hiredis: a parser in C that redis-py uses if it is there, which only relier brings along, and the others would not have."""

raise ImportError("hiredis is for relier alone")
