"""The command line: one file per verb, found by a table that imports nothing heavy."""
