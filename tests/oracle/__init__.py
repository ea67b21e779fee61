"""`make validate-long`: how often intervals and verdicts are right, in many scenarios, against exact enumeration.

policies    tiny policies of several architectures, in float64 from end to end, and what their laws are made of
states      every response of a policy as tables: probabilities, scores, gradients, exact values at any parameters
replicas    draws E and U by index and takes them through the statistics of the product, with the exact answers
scenarios   which policies, trainers and batches
counts      replications to shares: coverage, verdicts, tests over checkpoints
product     the same batches through a whole sweep of the product, to compare
page        docs/validation-long.md
"""
