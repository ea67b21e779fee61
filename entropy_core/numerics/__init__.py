"""The mathematics: tensors and plain numbers in, tensors or NamedTuples out. torch and the standard library only.

Shape legend, used as suffixes of tensor names:
    N  sequences                     K  tokens of all sequences, one after the other ("flat", with offsets_N1)
    B  rows of a padded micro-batch  L  its padded length
    R  rows of a chunk of positions  V  vocabulary      D  hidden width      P  prompts      G  responses per prompt
Entropies and log-probabilities are in nats. Dots in the formulas are derivatives along the update direction v.
"""
