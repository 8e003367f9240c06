"""Comparing PEFT methods: suites of cells are run into records, records are read into reports."""
