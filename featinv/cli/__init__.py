"""The command line: one door above the library."""
