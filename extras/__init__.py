"""Optional parts of the program, each imported only by the flag that needs it."""
