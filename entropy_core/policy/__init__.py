"""The model as one function of its parameters: scored, moved and differentiated."""
