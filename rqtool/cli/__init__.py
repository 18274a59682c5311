"""The command line: one thin file per command, each one call of the public functions."""
