"""One recipe from start to end: the command line, the stages in order, the ledger, the report."""
