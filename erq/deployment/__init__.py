"""Error-reduced weights → packed checkpoint → deployed modules."""
