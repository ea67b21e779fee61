"""From the columns of E to the rows of the result: estimates, intervals, verdicts, diagnostics."""
