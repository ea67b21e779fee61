"""Turn the token columns of the evaluation batch E into result rows: estimates, intervals, verdicts, diagnostics."""
