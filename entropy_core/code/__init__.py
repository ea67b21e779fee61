"""Which code can change a number: the definitions that a function reaches, and the libraries' releases."""
